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

    async def run_to_end[**P, T](
        self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `run`, but a cancellation, too, waits until the step has ended."""
        running = asyncio.create_task(self.run(step, *args, **kwargs))
        try:
            await wait_to_end(running)
        except asyncio.CancelledError:
            running.exception()  # it is seen; asyncio would log it otherwise
            raise
        return running.result()


async def wait_to_end(task: asyncio.Task[object]) -> None:
    """Wait until a task has ended; a cancellation waits for it too."""
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
