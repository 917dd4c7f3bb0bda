"""What a pass has done so far, and what it left."""

from collections import Counter
from typing import TYPE_CHECKING

from core.domain.model import Reason, Skip
from core.passes.pause import SharedPause

if TYPE_CHECKING:
    from core.domain.waiting import Waiting


class Tally:
    """Only the pass changes it."""

    def __init__(self, open_sessions: int) -> None:
        self.open = open_sessions
        self.counted = False
        self.waiting: Waiting | None = None  # None: not read
        self.elsewhere = Counter[Skip]()  # not for this pass to check
        self.latencies: list[float] = []  # seconds, one for each request
        self.rate_limited = 0  # requests that billing limited, and not because of their sessions
        self.not_open = 0  # of those asked for by id
        self.workers_started = 0
        self.out_of_time = False

    def skipped(
        self, reason: Reason, pause: SharedPause, *, checked: int, has_api_key: bool
    ) -> Counter[Skip]:
        """Why the other open sessions were not checked, if this pass has counted them."""
        skipped = Counter[Skip]()
        skipped[Skip.NOT_OPEN] = self.not_open
        if not has_api_key:
            skipped[Skip.NO_API_KEY] = self.open
        elif self.counted:
            unchecked = max(0, self.open - checked)
            skipped.update(self.elsewhere)
            # Others may have given back some of what they held when it was counted.
            others = max(0, unchecked - self.elsewhere[Skip.NOT_DUE])
            skipped[Skip.IN_FLIGHT] = min(self.elsewhere[Skip.IN_FLIGHT], others)
            left = max(0, unchecked - self.elsewhere[Skip.NOT_DUE] - skipped[Skip.IN_FLIGHT])
            if pause.rate is not None and reason is Reason.MANUAL:
                # What others hold waits for its turn.
                left += skipped.pop(Skip.IN_FLIGHT)
            skipped[self._why_left(pause)] += left
        return +skipped  # without zeros

    def _why_left(self, pause: SharedPause) -> Skip:
        if pause.until is not None:
            return Skip.PAUSED
        if pause.rate is not None:
            return Skip.RATE_LIMITED
        # Otherwise they were claimed by others, or left to the next pass.
        return Skip.DEADLINE if self.out_of_time else Skip.IN_FLIGHT
