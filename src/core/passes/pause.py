"""Whether a pass may ask billing: the pause that all workers share, as one pass follows it."""

from collections.abc import Iterable
from datetime import datetime

from core.domain.model import Answer, Outcome, Pause
from core.store.monitor_state import MonitorState


class SharedPause:
    """Follows the pause in the monitor's state during one pass.

    `read` and `agree` use the database, on its thread, and raise StoreError.
    """

    def __init__(self, state: MonitorState, at_start: Pause, *, until: datetime | None) -> None:
        self._state = state
        self._at_start = at_start
        self._rate_limited = False
        self.until = until  # None: no pause is in force

    @property
    def in_force(self) -> bool:
        """Whether this pass must not send another request."""
        return self._rate_limited or self.until is not None

    def rate_limited(self) -> None:
        """Billing has limited a request of this pass; `agree` tells the other workers."""
        self._rate_limited = True

    def read(self) -> datetime:
        """Learn of a new pause from the other workers; returns the database's clock."""
        pause, now = self._state.read_pause()
        self._follow(pause)
        return now

    def agree(self, answers: Iterable[Answer]) -> datetime:
        """Share what these answers say about a pause with the other workers, or learn it from them.

        Returns the database's clock.
        """
        answers = list(answers)
        pause, now = self._state.read_pause()
        limited = [a for a in answers if a.outcome is Outcome.RATE_LIMITED]
        healthy = any(not answer.outcome.is_error for answer in answers)
        if limited:
            # The longest that billing asked for; if it gave no number, the state's own backoff.
            seconds = [a.retry_after for a in limited if a.retry_after is not None]
            pause = self._state.pause(max(seconds, default=None))
        elif healthy and self._at_start.in_a_row and not self._is_new(pause):
            self._state.end_pauses(self._at_start)
            self._at_start = Pause(self._at_start.until, 0)
        self._follow(pause)
        return now

    def _follow(self, pause: Pause) -> None:
        if self._is_new(pause):
            self.until = pause.until

    def _is_new(self, pause: Pause) -> bool:
        """Whether a request of any worker led to this pause after this pass began."""
        return pause.until > self._at_start.until
