"""Virtual time: an event loop that never waits, and a database whose steps have prices."""

import asyncio
import selectors
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, override

from core.database.sqlite import SQLiteConnection, SQLiteDatabase

# What a step on the database takes in a pass at full speed. A pass logs its steps at DEBUG; these
# prices make a claim of 500 (5 statements) 20 ms, a record of 500 some 8 ms, a piece of the
# reconciling walk 10 ms and a single statement 2 ms, as measured on MariaDB. They include PyMySQL
# and the database thread's wait for the interpreter.
STATEMENT_SECONDS = 0.002
ROW_SECONDS = 0.000_01  # a row returned, inserted, changed or deleted
INSTRUCTION_SECONDS = 30e-9  # of SQLite's; it takes some 20 to look at a row of an index
INSTRUCTIONS = 1000  # it counts them by the thousand


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which waiting takes no time: when nothing is ready, the clock advances."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoWait(self))
        self.set_default_executor(_Inline())

    @override
    def time(self) -> float:
        return self.now


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: everything waits and no timer is set")
        self._loop.now += timeout
        return super().select(0)


class _Inline(ThreadPoolExecutor):
    """Runs each call at once, on the loop's own thread."""

    @override
    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Meter:
    """How long the work of an SQLite connection would have taken on MariaDB, in seconds.

    It prices what SQLite itself counts, so it needs no names of the code that it measures.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._changes_before = connection.total_changes
        self._statements = 0
        self._rows = 0
        self._instructions = 0
        connection.set_trace_callback(self._count_statement)
        connection.row_factory = self._count_row
        connection.set_progress_handler(self._count_instructions, INSTRUCTIONS)

    @property
    def seconds(self) -> float:
        """The price of all work until now."""
        rows = self._rows + self._connection.total_changes - self._changes_before
        return (
            self._statements * STATEMENT_SECONDS
            + rows * ROW_SECONDS
            + self._instructions * INSTRUCTION_SECONDS
        )

    def _count_statement(self, _sql: str) -> None:
        self._statements += 1

    def _count_row(self, _cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> tuple[Any, ...]:
        self._rows += 1
        return row

    def _count_instructions(self) -> int:
        self._instructions += INSTRUCTIONS
        return 0  # go on


class MeteredDatabase(SQLiteDatabase):
    meter: Meter

    @override
    def _connect(self) -> SQLiteConnection:
        connection = super()._connect()
        self.meter = Meter(connection._connection)  # noqa: SLF001 (SQLite's own, to count its work)
        return connection


class DatabaseThread(ThreadPoolExecutor):
    """A worker's database thread: each step takes what its work costs, one after the other."""

    def __init__(self, loop: VirtualLoop, meter: Meter) -> None:
        super().__init__(1)
        self._loop = loop
        self._meter = meter
        self._steps = deque[Callable[[], None]]()  # the first one is under way

    @override
    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def step() -> None:
            before = self._meter.seconds
            try:
                done = partial(future.set_result, fn(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 (it is the caller's)
                done = partial(future.set_exception, error)
            self._loop.call_later(self._meter.seconds - before, self._end, done)

        self._steps.append(step)
        if len(self._steps) == 1:
            step()
        return future

    def _end(self, done: Callable[[], None]) -> None:
        done()
        self._steps.popleft()
        if self._steps:
            self._steps[0]()
