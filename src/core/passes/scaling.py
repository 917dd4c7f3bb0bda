"""How many workers a tick needs."""

import asyncio
import math
from collections.abc import Callable
from datetime import datetime

from core.domain.model import Answer
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
    run, the leader included.
    """

    def __init__(self, start_worker: StartWorker, settings: Settings, under_way: int) -> None:
        self._start_worker = start_worker
        self._settings = settings
        self._under_way = under_way
        self._healthy_answers = 0
        self._healthy_seconds = 0.0

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

        `max_per_second` is what billing allows; no workers are started for more. Starts that fail
        are logged once. Nothing is lost: what is due stays due.
        """
        if max_per_second is not None:
            due = min(due, int(max_per_second * self._begin_within_seconds))
        wanted = min(math.ceil(due / self._checks_per_worker), self._settings.max_workers)
        starts = [
            asyncio.to_thread(self._start_worker, tick)
            for _ in range(max(0, wanted - self._under_way))
        ]
        results = await asyncio.gather(*starts, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            logger.error(
                f"❌ {len(failures)} of {len(starts)} workers could not be started: {failures[0]}"
            )
        return len(starts) - len(failures)

    @property
    def _checks_per_worker(self) -> int:
        """How many checks one worker begins within BEGIN_WITHIN_SHARE of the interval.

        With all its requests in flight it begins one whenever an answer comes (Little's law). The
        latency is the one that this worker measures, so it includes its own processor time.
        """
        in_flight = self._settings.max_concurrency
        latency = self._healthy_seconds / self._healthy_answers
        checks = in_flight * self._begin_within_seconds / max(latency, MIN_LATENCY_SECONDS)
        return in_flight + int(checks)

    @property
    def _begin_within_seconds(self) -> float:
        return BEGIN_WITHIN_SHARE * self._settings.interval_seconds
