"""How many workers a tick needs."""

import asyncio
import math
from collections.abc import Callable
from datetime import datetime

from core.domain.model import Answer
from core.domain.rate import workers
from core.log import logger
from core.settings import Settings

# The checks of a tick should begin within this share of the interval. The rest is for slow answers
# and for the next tick's sessions.
BEGIN_WITHIN_SHARE = 0.2
# Below this latency, a worker is limited by its processor.
MIN_LATENCY_SECONDS = 0.001

type StartWorker = Callable[[datetime], None]


class Scaling:
    """What a leader knows of its tick's workers. Errors and time-outs never lead to more workers.

    `start_worker` starts one more worker elsewhere, or raises; `under_way` counts the workers that
    run, the leader included. `latency` is that of earlier ticks, in seconds, if there is a budget.
    """

    def __init__(
        self, start_worker: StartWorker, settings: Settings, under_way: int, latency: float = 0.0
    ) -> None:
        self._start_worker = start_worker
        self._settings = settings
        self._under_way = under_way
        self._latency_before = latency
        self._of_tick = 1  # workers
        self._healthy_answers = 0
        self._healthy_seconds = 0.0

    @property
    def knows_latency(self) -> bool:
        return self._latency > 0

    def record_latency(self, answer: Answer) -> bool:
        """Take an answer; returns whether it completes the first round of healthy answers.

        Before that, the latency of billing is not known. If a tick has no such round, one worker is
        enough, or billing is not healthy.
        """
        if answer.outcome.is_error or answer.seconds is None:
            return False
        self._healthy_answers += 1
        self._healthy_seconds += answer.seconds
        return self._healthy_answers == self._settings.max_concurrency

    @property
    def max_useful_due(self) -> int:
        """This many due sessions keep MAX_WORKERS workers busy."""
        return self._checks_per_worker * self._settings.max_workers

    async def start_missing(
        self, due: int, tick: datetime, max_per_second: float | None = None
    ) -> int:
        """Start the workers that `due` sessions need; returns how many were started.

        `max_per_second` is what billing allows; no workers are started for more, and those of
        earlier ticks hand over. Starts that fail are logged once. Nothing is lost: what is due
        stays due.
        """
        settings, running = self._settings, self._under_way
        wanted = math.ceil(due / self._checks_per_worker)
        if max_per_second is not None:
            running = self._of_tick
            allowed = workers(
                max_per_second,
                self._latency,
                in_flight=settings.max_concurrency,
                interval_seconds=settings.interval_seconds,
            )
            wanted = min(wanted, allowed)
        missing = max(0, min(wanted - running, settings.max_workers - self._under_way))
        starts = [asyncio.to_thread(self._start_worker, tick) for _ in range(missing)]
        results = await asyncio.gather(*starts, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            logger.error(
                f"❌ {len(failures)} of {len(starts)} workers could not be started: {failures[0]}"
            )
        started = len(starts) - len(failures)
        self._of_tick += started
        self._under_way += started
        return started

    @property
    def _checks_per_worker(self) -> int:
        """How many checks one worker begins within BEGIN_WITHIN_SHARE of the interval.

        With all its requests in flight it begins one whenever an answer comes (Little's law). The
        latency is the one that this worker measures, so it includes its own processor time.
        """
        in_flight = self._settings.max_concurrency
        begin_within = BEGIN_WITHIN_SHARE * self._settings.interval_seconds
        return in_flight + int(in_flight * begin_within / max(self._latency, MIN_LATENCY_SECONDS))

    @property
    def _latency(self) -> float:
        """Mean seconds of this tick's healthy answers, once there is a round of them."""
        if self._healthy_answers < self._settings.max_concurrency:
            return self._latency_before
        return self._healthy_seconds / self._healthy_answers
