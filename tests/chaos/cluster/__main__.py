"""`make cluster`: Galera nodes, HAProxy, and schema changes by rename, with workers on all of them.

Two MariaDB nodes with Galera are started here, HAProxy, and a MariaDB of its own; MySQL is used
where TEST_MYSQL_URL names one. It prints a table, and exits with 1 if an invariant is violated.
"""

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from local.mariadb import mariadb_server
from testkit.shops import MySQLShop, connect, mysql_shop
from tests.chaos.bus import Bus, running_bus
from tests.chaos.cluster.servers import Cluster, galera, haproxy, install
from tests.chaos.cluster.trial import Trial, retried

REPORT = Path(__file__).parents[3] / "docs" / "reliability.md"
WORKERS_PER_NODE = 3
IDLE_SECONDS = 2.0  # after which HAProxy cuts a connection
HEAD = (
    "| tried | workers | rounds | checks | closed | deadlocks retried | passes in error |"
    " invariants |"
)

# The columns that a schema change widens and adds.
ALTERATIONS = (
    "MODIFY id VARCHAR(300) NOT NULL, MODIFY billing_checkout_id VARCHAR(400) NULL,"
    " ADD COLUMN amount DECIMAL(12, 2) FIRST"
)
WIDE_ID = 290  # the shop's ids had up to 255 characters
COLUMNS = "id, billing_checkout_id, billing_order_id, status"
NEW_VALUES = ", ".join(f"NEW.{column}" for column in COLUMNS.split(", "))
REPLACE = f"REPLACE INTO _checkout_session_new ({COLUMNS}) VALUES ({NEW_VALUES})"
DELETE = "DELETE IGNORE FROM _checkout_session_new WHERE id = OLD.id"
# As pt-online-schema-change makes them, so that writes of the meantime are in the copy.
TRIGGERS = {
    "ins": f"AFTER INSERT ON checkout_session FOR EACH ROW {REPLACE}",
    "upd": f"AFTER UPDATE ON checkout_session FOR EACH ROW BEGIN {DELETE}; {REPLACE}; END",
    "del": f"AFTER DELETE ON checkout_session FOR EACH ROW {DELETE}",
}
RENAME = (
    "RENAME TABLE checkout_session TO _checkout_session_old,"
    " _checkout_session_new TO checkout_session"
)
CHUNK = 50
STEP_SECONDS = 0.1  # between two chunks, so that workers tick meanwhile
CUT_OVER_SECONDS = 1.0  # for which gh-ost's cut-over locks the table


class Cases:
    """Runs the cases, and keeps a line of the table for each."""

    def __init__(self, bus: Bus, rounds: int) -> None:
        self.bus = bus
        self.rounds = rounds
        self.lines = [HEAD, "|---" * HEAD.count(" |") + "|"]
        self.broken: list[str] = []
        self._trials = 0

    @contextmanager
    def trial(self, what: str, servers: Sequence[str], workers: Sequence[str]) -> Iterator[Trial]:
        """A case with a shop of its own, which is reached by `servers`; `workers` are servers."""
        self._trials += 1
        with mysql_shop(servers[0]) as first:
            shops = [MySQLShop(server, first.database) for server in servers]
            urls = [f"{server}{first.database}" for server in workers]
            trial = Trial(f"t{self._trials}", shops, self.bus, urls)
            yield trial
            trial.finish()
        values = [
            trial.workers,
            trial.rounds,
            f"{trial.checks:,}",
            f"{len(trial.paid):,}",
            f"{trial.deadlocks:,}",
            len(trial.errors),
            f"{len(trial.broken)} violated" if trial.broken else "all held",
        ]
        self.lines.append(f"| {' | '.join(map(str, [what, *values]))} |")
        self.broken += [f"{what}: {broken}" for broken in trial.broken]
        print(
            self.lines[-1], *{s for _, s in trial.errors}, *trial.broken[:5], sep="\n", flush=True
        )
        if trial.published_twice:
            print(f"{trial.published_twice} events were published twice", flush=True)


def two_nodes(cases: Cases, cluster: Cluster) -> None:
    workers = cluster.urls * WORKERS_PER_NODE
    with cases.trial("two Galera nodes", cluster.urls, workers) as trial:
        for _ in range(cases.rounds):
            trial.round()
        no_errors(trial)


def killed_node(cases: Cases, cluster: Cluster, directory: Path) -> None:
    """The second node is killed in a pass, comes back, and takes part again.

    Two of two are no majority without the other: until an operator says so, the first one is no
    cluster either. One of the second node's workers reaches the first one through HAProxy.
    """
    first, second = cluster.urls
    with (
        haproxy(directory, (second, first), idle=60) as proxy,
        cases.trial(
            "a node is killed in a pass, and comes back",
            [first],
            [first, first, second, proxy.url],
        ) as trial,
    ):
        for _ in range(5):
            trial.round()
        no_errors(trial)
        last = trial.checks + 100
        trial.during = lambda: cluster.second.kill() if trial.checks == last else None
        trial.round(exact=False)
        for _ in range(2):
            expect_errors(trial, 4, partial(trial.round, exact=False, shop=False))
        cluster.bootstrap()
        trial.round(exact=False)  # what the killed pass had claimed waits for its lease
        for _ in range(5):
            expect_errors(trial, 1, partial(trial.round, exact=False))
        expect_errors(trial, 1, trial.round)
        cluster.second.start()
        for _ in range(5):
            expect_errors(trial, 0, trial.round)


def idle_connections(cases: Cases, server: str, directory: Path) -> None:
    with (
        haproxy(directory, [server], idle=IDLE_SECONDS) as proxy,
        cases.trial("HAProxy cuts idle connections", [server], [proxy.url] * 2) as trial,
    ):
        for number in range(6):
            trial.round()
            if proxy.connections() < 2 * number:
                trial.broken.append("HAProxy did not cut the connections")
            time.sleep(IDLE_SECONDS + 0.5)
        no_errors(trial)


def schema_change(
    cases: Cases,
    what: str,
    servers: Sequence[str],
    cut_over: Callable[[MySQLShop], None],
) -> None:
    with cases.trial(what, servers, [*servers] * (4 // len(servers))) as trial:
        failures: list[BaseException] = []

        def change() -> None:
            try:
                copy_table(trial.shops[0])
                cut_over(trial.shops[0])
                retried(partial(trial.shops[0].run, "DROP TABLE _checkout_session_old"))
            except BaseException as error:  # noqa: BLE001 (raised below)
                failures.append(error)

        trial.round()
        changing = threading.Thread(target=change)
        changing.start()
        while changing.is_alive():
            trial.round()
        for failure in failures:
            raise failure
        trial.id_length = WIDE_ID
        for _ in range(3):
            trial.round()
        trial.add_worker(trial.addresses[0])  # a cold one
        for _ in range(3):
            trial.round()
        [(changed,)] = trial.shops[0].run(
            "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = DATABASE()"
            " AND table_name = 'checkout_session' AND column_name = 'amount'"
        )
        if not changed:
            trial.broken.append("the schema is the old one")
        no_errors(trial)


def copy_table(shop: MySQLShop) -> None:
    """Copy the table chunk by chunk, while triggers carry over what is written meanwhile."""
    shop.run("CREATE TABLE _checkout_session_new LIKE checkout_session")
    shop.run(f"ALTER TABLE _checkout_session_new {ALTERATIONS}")
    for name, definition in TRIGGERS.items():
        retried(partial(shop.run, f"CREATE TRIGGER copy_{name} {definition}"))
    ids = [i for (i,) in shop.run("SELECT id FROM checkout_session ORDER BY id")]
    for start in range(0, len(ids), CHUNK):
        some = ids[start : start + CHUNK]
        retried(
            partial(
                shop.run,
                f"INSERT IGNORE INTO _checkout_session_new ({COLUMNS}) SELECT {COLUMNS}"
                " FROM checkout_session FORCE INDEX (PRIMARY) WHERE id >= %s AND id <= %s"
                " LOCK IN SHARE MODE",
                (some[0], some[-1]),
            )
        )
        time.sleep(STEP_SECONDS)


def rename(shop: MySQLShop) -> None:
    """As pt-online-schema-change does: one statement swaps the tables."""
    retried(partial(shop.run, RENAME))


def rename_under_lock(shop: MySQLShop) -> None:
    """As gh-ost does: the RENAME waits for a lock, behind which all other statements queue."""
    renaming = threading.Thread(target=shop.run, args=(RENAME,))
    with connect(shop.server, shop.database) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE _checkout_session_old (sentry INT PRIMARY KEY)")
        cursor.execute("LOCK TABLES checkout_session WRITE, _checkout_session_old WRITE")
        renaming.start()
        time.sleep(CUT_OVER_SECONDS)
        cursor.execute("DROP TABLE _checkout_session_old")
        cursor.execute("UNLOCK TABLES")
    renaming.join()


def no_errors(trial: Trial) -> None:
    trial.broken += [f"round {at} ended in: {sentence}" for at, sentence in trial.errors]


def expect_errors(trial: Trial, count: int, tick: Callable[[], None]) -> None:
    """So many workers of this round say one sentence; the others work."""
    before = len(trial.errors)
    tick()
    if (errors := len(trial.errors) - before) != count:
        trial.broken.append(f"round {trial.rounds - 1} has {errors} errors, not {count}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=30, help="of the two nodes' case")
    parser.add_argument("--report", action="store_true", help="write docs/reliability.md's table")
    options = parser.parse_args()
    install()
    logging.disable()  # the monitor's log
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bus = stack.enter_context(running_bus())
        os.environ |= {
            "AWS_ENDPOINT_URL_EVENTBRIDGE": bus.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "eu-west-1",
        }
        cases = Cases(bus, options.rounds)
        with galera(directory) as cluster:
            two_nodes(cases, cluster)
            schema_change(cases, "a schema change by rename, Galera", cluster.urls, rename)
            idle_connections(cases, cluster.first, directory)
            killed_node(cases, cluster, directory)
        (directory / "single").mkdir()
        servers = {"MariaDB": stack.enter_context(mariadb_server(directory / "single"))}
        if mysql := os.environ.get("TEST_MYSQL_URL"):
            servers["MySQL"] = mysql
        for engine, server in servers.items():
            schema_change(cases, f"a schema change by rename, {engine}", [server], rename)
            what = f"the same under gh-ost's lock, {engine}"
            schema_change(cases, what, [server], rename_under_lock)
    print("", *cases.lines, *cases.broken[:20], sep="\n")
    if options.report:
        head, _, rest = REPORT.read_text(encoding="utf-8").partition("<!-- cluster -->\n")
        _, _, tail = rest.partition("<!-- /cluster -->")
        table = "\n".join(cases.lines)
        text = f"{head}<!-- cluster -->\n{table}\n<!-- /cluster -->{tail}"
        REPORT.write_text(text, encoding="utf-8")
    return bool(cases.broken)


if __name__ == "__main__":
    sys.exit(main())
