import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.database.thread import DatabaseThread


async def test_a_step_that_has_to_end_ends_however_often_it_is_cancelled() -> None:
    free = threading.Event()
    ended: list[str] = []
    with ThreadPoolExecutor(1) as executor:
        executor.submit(free.wait)
        running = asyncio.create_task(DatabaseThread(executor).run_to_end(ended.append, "ended"))
        for _ in range(10):
            await asyncio.sleep(0)
            running.cancel()
        free.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert ended == ["ended"]
