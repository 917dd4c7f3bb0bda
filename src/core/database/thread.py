"""The thread that owns the database's connection, as the event loop sees it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from core.log import logger


class DatabaseThread:
    """Runs steps one after the other on the thread that owns the connection, off the event loop."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run[**P, T](self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        result = await loop.run_in_executor(self._executor, partial(step, *args, **kwargs))
        logger.debug(f"Database: {step.__name__} took {(loop.time() - began) * 1000:.1f} ms")
        return result
