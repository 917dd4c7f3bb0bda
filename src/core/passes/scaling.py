"""How many workers a tick needs, and how a leader on Lambda starts them."""

import asyncio
import math
from collections.abc import Callable
from datetime import datetime

from core.domain.model import Answer
from core.log import logger
from core.settings import Settings

# The checks of a tick begin within this share of the interval: the rest of it is for answers that
# are slow, and for the next tick's sessions.
BEGIN_WITHIN_SHARE = 0.2
# Below it, a worker's processor is what limits it.
SHORTEST_LATENCY_SECONDS = 0.001

type StartWorker = Callable[[datetime], None]


class Crew:
    """What a leader knows of its tick's workers; errors and time-outs are no reason for more.

    `start` starts one more worker, elsewhere; `under_way` counts those that run, the leader
    included.
    """

    def __init__(self, start: StartWorker, settings: Settings, under_way: int) -> None:
        self._start = start
        self._settings = settings
        self._under_way = under_way
        self._healthy = 0
        self._healthy_seconds = 0.0

    def hears(self, answer: Answer) -> bool:
        """Take an answer; whether it is the one that ends a first round of healthy answers.

        Before, it is not known how long billing takes. Where a tick has no such round, one worker
        is enough, or billing is not well.
        """
        if answer.outcome.is_error or answer.seconds is None:
            return False
        self._healthy += 1
        self._healthy_seconds += answer.seconds
        return self._healthy == self._settings.max_concurrency

    @property
    def most_due(self) -> int:
        """So many sessions keep as many workers busy as there may be."""
        return self._share * self._settings.max_workers

    async def start(self, due: int, tick: datetime) -> int:
        """Start the workers that are missing, where `due` sessions are; returns how many were.

        A start that fails is said once, and loses nothing: what is due stays due.
        """
        wanted = min(math.ceil(due / self._share), self._settings.max_workers)
        starts = [
            asyncio.to_thread(self._start, tick) for _ in range(max(0, wanted - self._under_way))
        ]
        ends = await asyncio.gather(*starts, return_exceptions=True)
        failures = [end for end in ends if isinstance(end, BaseException)]
        if failures:
            logger.error(
                f"❌ {len(failures)} of {len(starts)} workers could not be started: {failures[0]}"
            )
        return len(starts) - len(failures)

    @property
    def _share(self) -> int:
        """How many checks one worker begins within BEGIN_WITHIN_SHARE of the interval.

        With all its requests in flight it begins one whenever an answer comes (Little's law). The
        latency is the one that this worker sees: what its own processor takes is in it.
        """
        in_flight = self._settings.max_concurrency
        latency = self._healthy_seconds / self._healthy
        within = BEGIN_WITHIN_SHARE * self._settings.interval_seconds
        return in_flight + int(in_flight * within / max(latency, SHORTEST_LATENCY_SECONDS))
