"""What a pass has done so far, and what it left."""

from collections import Counter
from dataclasses import dataclass, field

from core.domain.model import Reason, Skip
from core.domain.waiting import Waiting
from core.passes.pause import SharedPause


@dataclass(slots=True)
class Tally:
    """Only the pass changes it."""

    open: int
    counted: bool = False
    waiting: Waiting | None = None  # None: not read
    elsewhere: Counter[Skip] = field(default_factory=Counter)  # not for this pass to check
    latencies: list[float] = field(default_factory=list)  # seconds, one for each request
    rate_limited: int = 0  # requests that billing limited, and not because of their sessions
    not_open: int = 0  # of those asked for by id
    workers_started: int = 0
    out_of_time: bool = False

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
