"""A world whose database is behind a proxy, on MariaDB or MySQL; set anew for each case."""

import random
import threading  # noqa: TC003 (no cycle to avoid)

from tests.chaos.proxy import Proxy
from tests.chaos.world import World

SESSIONS = {
    "open-1": "fine-1",
    "open-2": "fine-2",
    "paid-1": "paid-1",
    "paid-2": "paid-2",
    "failed": "failed-1",
    "broken": "500-1",
    "without": None,
}
WORDS = {"paid-1": "paid", "paid-2": "paid", "failed-1": "failed"}


class Stage:
    """A world behind a proxy, set anew for each case."""

    def __init__(self, engine: str, world: World, proxy: Proxy) -> None:
        self.engine = engine
        self._statements = 0
        self.world = world
        self.proxy = proxy
        self.deed: threading.Thread | None = None  # what the shop does meanwhile
        world.url = proxy.url(world.shop.database)  # type: ignore[attr-defined]
        self.worker = world.worker()
        self.set()
        self.world.tick()  # connects, and makes the tables

    def set(self) -> None:
        """As it was in the beginning; only the worker is a warm one."""
        world, run = self.world, self.world.shop.run
        self.proxy.reset()
        world.tick()  # makes the tables anew that a case has dropped
        tables = [name for (name,) in run("SHOW TABLES")]
        for name in tables:
            run(f"DELETE FROM {name}")
        run(
            "INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES "
            + ", ".join(["(%s, %s, 'open')"] * len(SESSIONS)),
            [value for item in SESSIONS.items() for value in item],
        )
        world.billing.asked.clear()
        world.billing.words = dict(WORDS)
        world.billing.healed = False
        world.billing.before = lambda _checkout: None
        world.bus.events.clear()
        world.closed_by_shop.clear()
        world.crashed = False
        world.failed.clear()
        world.advance(60)
        self.proxy.reset()

    def statements_of_a_pass(self) -> int:
        """How many statements a pass has that does all that a pass can do."""
        if self._statements == 0:
            self.set()
            self.world.tick()
            self._statements = self.proxy.count
        return self._statements

    def sometimes(self, many: int, random: random.Random) -> list[int]:
        return sorted(random.sample(range(1, self.statements_of_a_pass() + 1), many))
