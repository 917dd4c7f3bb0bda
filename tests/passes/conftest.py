"""Fixtures of several tests of passes."""

import pytest

from core.passes import held_claims


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are written without waiting for the rest of their batch."""
    monkeypatch.setattr(held_claims, "HOLD_SECONDS", 0.0)
