"""What the shop's database refuses for one session is that session's outcome, and no other's.

26 sessions are paid at once, and something is wrong with one of them, `s7`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from core.domain.model import Answer, Outcome
from core.domain.summary import Summary
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered
from tests.conftest import PLACES
from tests.store.fake_bus import FAILED, PAID, Bus, publishing_passes, statuses
from tests.support import FakeBilling, Passes, until

SESSIONS = 26
BAD, BAD_CHECKOUT = "s7", "checkout_active_7"
# How often it has been asked after each tick of the next minute.
BACKS_OFF = [1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]


@dataclass(frozen=True)
class Refused:
    """Statements that make the database refuse one session, and the cause that is logged."""

    name: str
    spoil: Sequence[str]
    cause: str
    answer: Answer = PAID  # about the bad session; all others are paid


def before_update(body: str, declare: str = "") -> str:
    return (
        "CREATE TRIGGER audit BEFORE UPDATE ON checkout_session FOR EACH ROW"
        f" BEGIN {declare} IF OLD.id = '{BAD}' THEN {body} END IF; END"
    )


def signal(errno: int, state: str = "45000") -> str:
    return before_update(
        f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {errno}, MESSAGE_TEXT = 'under audit';"
    )


NOTES = "CREATE TABLE note (session_id VARCHAR(3), n INT)"
# A trigger may call a procedure, which has a definer of its own.
CALLS_CHECKED = before_update("CALL checked();")

REFUSED = [
    Refused("its own errno", [signal(30001)], "under audit (30001)"),
    *(
        # Raised for one row, these look as if the whole server could not be used: it takes no
        # writes, it has ended the connection, a lock takes too long, it has no room.
        Refused(f"the errno {errno} of a server", [signal(errno)], f"under audit ({errno})")
        for errno in (1290, 2013, 1205, 1040)
    ),
    Refused("a deadlock each time", [signal(1213, "40001")], "under audit (1213)"),
    Refused("a right each time", [signal(1142, "42000")], "under audit (1142)"),
    Refused(
        "a table that is missing", [before_update("INSERT INTO gone VALUES (1);")], "gone' doesn't"
    ),
    Refused(
        "a column that is missing",
        [NOTES, before_update("INSERT INTO note (missing) VALUES (1);")],
        "(1054)",
    ),
    Refused(
        "two rows for one variable",
        [
            NOTES,
            "INSERT INTO note VALUES ('a', 1), ('b', 2)",
            before_update("SELECT n INTO found FROM note;", "DECLARE found INT;"),
        ],
        "(1172)",
    ),
    Refused(
        "a text too long for an audit table",
        [NOTES, before_update("INSERT INTO note VALUES ('too long', 1);")],
        "(1406)",
    ),
    Refused(
        "a number too large for an audit table",
        [NOTES, before_update("INSERT INTO note VALUES ('s7', 3000000000);")],
        "(1264)",
    ),
    Refused(
        "a definer that is gone",
        ["CREATE DEFINER = 'gone'@'%' PROCEDURE checked() SELECT 1 INTO @n", CALLS_CHECKED],
        "(1449)",
    ),
    Refused(
        "the old status set back",
        [before_update("SET NEW.status = OLD.status;")],
        "the row does not keep the new status",
    ),
    Refused(
        "another status set",
        [before_update("SET NEW.status = 'failure';")],
        "the row does not keep the new status",
    ),
    Refused(
        "a check of values",
        [f"ALTER TABLE checkout_session ADD CHECK (id <> '{BAD}' OR status <> 'success')"],
        "constraint",
    ),
    Refused(
        "an ENUM without its word",
        ["ALTER TABLE checkout_session MODIFY status ENUM('open', 'success') NOT NULL"],
        "(1265)",
        FAILED,
    ),
    Refused(
        "a foreign key on status",
        [
            "CREATE TABLE allowed (status VARCHAR(255) PRIMARY KEY)",
            "INSERT INTO allowed VALUES ('open'), ('success')",
            "ALTER TABLE checkout_session ADD FOREIGN KEY (status) REFERENCES allowed (status)",
        ],
        "(1452)",
        FAILED,
    ),
    Refused(
        "a text of billing that cannot be encoded",
        [],
        "UnicodeEncodeError",
        PAID._replace(billing_status="paid\ud800"),
    ),
]


ON_SQLITE = [
    Refused(
        how,
        [
            (
                f"CREATE TRIGGER audit BEFORE UPDATE ON checkout_session WHEN OLD.id = '{BAD}'"
                f" BEGIN {body}; END"
            )
        ],
        cause,
    )
    for how, body, cause in (
        ("abort", "SELECT RAISE(ABORT, 'under audit')", "under audit"),
        ("fail", "SELECT RAISE(FAIL, 'under audit')", "under audit"),
        ("rollback", "SELECT RAISE(ROLLBACK, 'under audit')", "under audit"),
        ("bad JSON", "SELECT json('{')", "malformed JSON"),
    )
] + [
    Refused(
        "the old status set back",
        [
            (
                "CREATE TRIGGER audit AFTER UPDATE ON checkout_session WHEN OLD.id = 's7'"
                " BEGIN UPDATE checkout_session SET status = 'open' WHERE id = OLD.id; END"
            )
        ],
        "the row does not keep the new status",
    ),
    Refused(
        "a text of billing that cannot be encoded",
        [],
        "UnicodeEncodeError",
        PAID._replace(billing_status="paid\ud800"),
    ),
]


def all_paid(count: int = SESSIONS) -> FakeBilling:
    return FakeBilling({f"checkout_active_{n}": PAID for n in range(count)})


async def assert_only_one_is_refused(
    passes: Passes, bus: Bus, case: Refused, caplog: pytest.LogCaptureFixture, *, ticks: int = 2
) -> None:
    shop, clock = passes.shop, passes.clock
    add_sessions(shop, numbered(SESSIONS))
    for statement in case.spoil:
        shop.run(statement)
    billing = passes.billing = all_paid()
    billing.answers[BAD_CHECKOUT] = case.answer
    passes.publisher = bus
    summary = await passes.run()
    closed = sorted({f"s{n}" for n in range(SESSIONS)} - {BAD})
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 1, Outcome.REFUSED: 1}
    assert (summary.status_changes, summary.unpublished) == (SESSIONS - 1, 0)
    assert sorted(i for i, status in statuses(shop).items() if status == "success") == closed
    assert statuses(shop)[BAD] == "open"
    assert_published_and_logged(shop, bus, closed)
    assert queue_of(shop) == [(BAD, "refused", 1, None)]
    [line] = [m for m in caplog.messages if BAD_CHECKOUT in m]
    assert line.startswith(f"❌ Checkout session {BAD} ({BAD_CHECKOUT}) cannot become ")
    assert case.cause.lower() in line.lower()
    assert "GRANT" not in line
    asked = []
    for _ in range(ticks):
        clock.advance(5)
        await passes.run()
        asked.append(billing.asked[BAD_CHECKOUT])
    assert asked == BACKS_OFF[:ticks]
    assert max(n for checkout, n in billing.asked.items() if checkout != BAD_CHECKOUT) == 1
    assert_published_and_logged(shop, bus, closed)


def assert_published_and_logged(shop: Shop, bus: Bus, closed: Sequence[str]) -> None:
    """Each of these sessions once, and no other."""
    assert sorted(bus.session_ids) == sorted(closed)
    logged = shop.run("SELECT session_id FROM checkout_session_change")
    assert sorted(i for (i,) in logged) == sorted(closed)


def queue_of(shop: Shop) -> list[tuple[object, ...]]:
    return shop.run(
        "SELECT session_id, last_outcome, consecutive_failures, claimed_until"
        " FROM checkout_session_check"
    )


@pytest.fixture(autouse=True)
def retries_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.database.mysql.random.uniform", lambda *_: 0.0)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_a_refused_session_delays_no_other(
    server_shop: Shop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    case: Refused,
) -> None:
    passes = Passes(server_shop, clock, None)
    await assert_only_one_is_refused(passes, bus, case, caplog)


@pytest.mark.parametrize("case", ON_SQLITE, ids=lambda case: case.name)
async def test_a_refused_session_delays_no_other_on_sqlite(
    sqlite_shop: Shop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    case: Refused,
) -> None:
    passes = Passes(sqlite_shop, clock, None)
    await assert_only_one_is_refused(passes, bus, case, caplog)


async def test_a_refused_session_backs_off(
    server_shop: Shop, clock: FakeClock, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    passes = Passes(server_shop, clock, None)
    await assert_only_one_is_refused(passes, bus, REFUSED[0], caplog, ticks=len(BACKS_OFF))


@pytest.fixture
def user(server_shop: MySQLShop) -> Iterator[Callable[..., MySQLShop]]:
    """Creates users of the shop's server that have only the rights given."""
    name = f"u{server_shop.database[-12:]}"

    def make(*rights: str) -> MySQLShop:
        for place in PLACES:
            server_shop.run(f"CREATE USER {name}@{place} IDENTIFIED BY 'limited-pass'")
            for right in rights:
                server_shop.run(f"GRANT {right} TO {name}@{place}")
        server = urlsplit(server_shop.server)
        return MySQLShop(
            f"mysql://{name}:limited-pass@{server.hostname}:{server.port}/", server_shop.database
        )

    yield make
    for place in PLACES:
        server_shop.run(f"DROP USER IF EXISTS {name}@{place}")


def rights_without(*missing: str) -> list[str]:
    """The documented rights, but for some on the shop's table."""
    columns = ["id", "billing_checkout_id", "billing_order_id", "status"]
    select = [column for column in columns if column not in missing]
    rights = [f"SELECT ({', '.join(select)}) ON {{}}.checkout_session"]
    if "UPDATE (status)" not in missing:
        rights.append("UPDATE (status) ON {}.checkout_session")
    return rights + [
        f"CREATE, SELECT, INSERT, UPDATE, DELETE ON {{}}.checkout_session_{table}"
        for table in ("batch", "check", "run", "pause", "change")
    ]


async def test_a_trigger_whose_definer_lacks_a_right_delays_no_other(
    server_shop: MySQLShop,
    clock: FakeClock,
    bus: Bus,
    user: Callable[..., MySQLShop],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The error is the one of a right that the monitor lacks, but it is about one session."""
    user(f"EXECUTE ON {server_shop.database}.*")
    server_shop.run(NOTES)
    definer = f"u{server_shop.database[-12:]}"
    server_shop.run(
        f"CREATE DEFINER = {definer}@'%' PROCEDURE checked() INSERT INTO note VALUES ('s7', 1)"
    )
    case = Refused("definer", [CALLS_CHECKED], "INSERT command denied to user")
    await assert_only_one_is_refused(Passes(server_shop, clock, None), bus, case, caplog)


@pytest.mark.slow
async def test_a_trigger_that_waits_for_a_lock_delays_no_other(
    server_shop: MySQLShop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("core.database.mysql_connection.LOCK_WAIT_SECONDS", 1)
    server_shop.run(f"{NOTES} ENGINE=InnoDB")
    server_shop.run("INSERT INTO note VALUES ('s7', 1)")
    case = Refused(
        "lock", [before_update("UPDATE note SET n = n + 1;")], "Lock wait timeout exceeded"
    )
    with connect(server_shop.server, server_shop.database) as other, other.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM note FOR UPDATE")
        await assert_only_one_is_refused(
            Passes(server_shop, clock, None), bus, case, caplog, ticks=0
        )


@pytest.mark.slow
async def test_a_trigger_that_takes_too_long_delays_no_other(
    server_shop: MySQLShop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MySQL does not end such a statement; the client gives it up, and its connection."""
    monkeypatch.setattr("core.database.mysql_connection.SERVER_STATEMENT_SECONDS", 1)
    monkeypatch.setattr("core.database.mysql_connection.STATEMENT_SECONDS", 1.2)
    case = Refused("slow", [before_update("DO SLEEP(20);")], "(")
    await assert_only_one_is_refused(Passes(server_shop, clock, None), bus, case, caplog, ticks=0)


ANY_ROW = [
    Refused(
        "a generated status",
        [
            (
                "ALTER TABLE checkout_session DROP COLUMN status, ADD COLUMN state VARCHAR(20)"
                " NOT NULL DEFAULT 'open'"
            ),
            (
                "ALTER TABLE checkout_session ADD COLUMN status VARCHAR(20) AS (LOWER(state))"
                " STORED, ADD KEY checkout_session_status (status)"
            ),
        ],
        "generated column",
    ),
    Refused(
        "an ENUM without the word",
        ["ALTER TABLE checkout_session MODIFY status ENUM('open', 'failure') NOT NULL"],
        "(1265)",
    ),
    Refused(
        "every row of a trigger",
        [
            (
                "CREATE TRIGGER audit BEFORE UPDATE ON checkout_session FOR EACH ROW"
                " SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 30001, MESSAGE_TEXT = 'under audit'"
            )
        ],
        "under audit (30001)",
    ),
]


@pytest.mark.parametrize("case", ANY_ROW, ids=lambda case: case.name)
async def test_a_table_that_refuses_every_change_delays_no_check(
    server_shop: Shop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    case: Refused,
) -> None:
    add_sessions(server_shop, numbered(SESSIONS))
    for statement in case.spoil:
        server_shop.run(statement)
    billing = all_paid(13)
    passes = publishing_passes(server_shop, clock, billing, bus)
    for _ in range(4):
        summary = await passes.run()
        clock.advance(5)
        assert summary.outcomes[Outcome.ACTIVE] == 13
    assert set(statuses(server_shop).values()) == {"open"}
    assert bus.session_ids == []
    for number in range(13):
        lines = [m for m in caplog.messages if f"(checkout_active_{number})" in m]
        assert len(lines) == billing.asked[f"checkout_active_{number}"] <= 2
        assert all(case.cause in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "count"), [("UPDATE (status)", 600), ("billing_order_id", 26)])
async def test_a_right_that_is_missing_delays_no_check(  # noqa: PLR0917 (fixtures)
    server_shop: MySQLShop,
    clock: FakeClock,
    user: Callable[..., MySQLShop],
    caplog: pytest.LogCaptureFixture,
    missing: str,
    count: int,
) -> None:
    """One session is paid; the others are asked at each of 13 ticks."""
    add_sessions(server_shop, numbered(count))
    Passes(server_shop, clock, None)  # makes the tables
    limited = user(*(r.format(server_shop.database) for r in rights_without(missing)))
    billing = FakeBilling({BAD_CHECKOUT: PAID})
    passes = Passes(limited, clock, billing)
    for _ in range(13):
        before = len([m for m in caplog.messages if "GRANT" in m])
        summary = await passes.run()
        lines = [m for m in caplog.messages if "GRANT" in m][before:]
        assert len(lines) == summary.outcomes[Outcome.REFUSED]
        assert all(
            "Run: GRANT SELECT, UPDATE (status) ON " in line
            and line.startswith(f"❌ Checkout session {BAD} ")
            for line in lines
        )
        clock.advance(5)
    asked = {c: n for c, n in billing.asked.items() if c != BAD_CHECKOUT}
    assert (len(asked), set(asked.values())) == (count - 1, {13})
    assert 1 <= billing.asked[BAD_CHECKOUT] <= 5
    assert claimed(server_shop) == 0


async def pass_and_meanwhile(passes: Passes, happens: Callable[[], object]) -> Summary:
    """A pass in which something happens while billing has not answered yet."""
    billing = passes.billing
    assert billing is not None
    answer = FakeBilling.check
    asked = 0

    class Meanwhile(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            nonlocal asked
            asked += 1
            if asked == SESSIONS:
                happens()
            await until(lambda: asked == SESSIONS)
            return await answer(self, billing_checkout_id)

    passes.billing = Meanwhile(billing.answers)
    return await passes.run(MAX_CONCURRENCY=str(SESSIONS))


async def test_an_id_written_differently_meanwhile_is_closed_too(
    server_shop: Shop, clock: FakeClock, bus: Bus
) -> None:
    """By the collation it is the same id."""
    add_sessions(server_shop, numbered(SESSIONS))
    passes = publishing_passes(server_shop, clock, all_paid(), bus)
    recase = f"UPDATE checkout_session SET id = UPPER(id) WHERE id = '{BAD}'"
    summary = await pass_and_meanwhile(passes, lambda: server_shop.run(recase))
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS}
    assert statuses(server_shop)["S7"] == "success"
    assert set(statuses(server_shop).values()) == {"success"}
    assert sorted(bus.session_ids) == sorted(numbered(SESSIONS))
    assert queue_of(server_shop) == []


async def test_a_session_deleted_meanwhile_is_dropped_and_not_published(
    server_shop: Shop, clock: FakeClock, bus: Bus
) -> None:
    add_sessions(server_shop, numbered(SESSIONS))
    passes = publishing_passes(server_shop, clock, all_paid(), bus)
    delete = f"DELETE FROM checkout_session WHERE id = '{BAD}'"
    summary = await pass_and_meanwhile(passes, lambda: server_shop.run(delete))
    assert (summary.errors, summary.status_changes) == (0, SESSIONS - 1)
    closed = sorted(set(numbered(SESSIONS)) - {BAD})
    assert_published_and_logged(server_shop, bus, closed)
    assert queue_of(server_shop) == []


async def test_a_locked_row_and_a_refused_one_delay_no_other(
    server_shop: MySQLShop, clock: FakeClock, bus: Bus
) -> None:
    add_sessions(server_shop, numbered(SESSIONS))
    server_shop.run(signal(30001))
    passes = publishing_passes(server_shop, clock, all_paid(), bus)
    with connect(server_shop.server, server_shop.database) as shop, shop.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM checkout_session WHERE id = 's3' FOR UPDATE")
        summary = await passes.run()
    assert summary.outcomes == {
        Outcome.CLOSED: SESSIONS - 2,
        Outcome.DEFERRED: 1,
        Outcome.REFUSED: 1,
    }
    assert_published_and_logged(server_shop, bus, sorted({*numbered(SESSIONS)} - {BAD, "s3"}))


@pytest.mark.parametrize(
    "id_", ["s7 ", "s7\u00a0", "S\u017f7", "7\u0308", "\U0001f3c1", "%7_", "a'b\"c\\"]
)
async def test_an_unusual_id_is_closed_as_any_other(
    server_shop: Shop, clock: FakeClock, bus: Bus, id_: str
) -> None:
    sessions = numbered(SESSIONS)
    del sessions[BAD]
    add_sessions(server_shop, {**sessions, id_: "checkout_other"})
    billing = all_paid()
    billing.answers["checkout_other"] = PAID
    summary = await publishing_passes(server_shop, clock, billing, bus).run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS}
    assert set(statuses(server_shop).values()) == {"success"}
    assert sorted(bus.session_ids) == sorted(statuses(server_shop))


@pytest.mark.parametrize(
    "type_", ["BIGINT UNSIGNED ZEROFILL", "DECIMAL(20, 2)", "VARBINARY(64)", "CHAR(64)"]
)
async def test_a_checkout_id_of_any_type_is_compared_with_itself(
    server_shop: Shop, clock: FakeClock, bus: Bus, type_: str
) -> None:
    server_shop.run(f"ALTER TABLE checkout_session MODIFY billing_checkout_id {type_}")
    add_sessions(server_shop, {f"s{n}": str(100 + n) for n in range(3)})

    class PaidBilling(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            return PAID

    summary = await publishing_passes(server_shop, clock, PaidBilling(), bus).run()
    assert summary.outcomes == {Outcome.CLOSED: 3}
    assert sorted(bus.session_ids) == ["s0", "s1", "s2"]


async def test_a_log_narrower_than_the_id_is_widened_and_one_event_published(
    server_shop: Shop, clock: FakeClock, bus: Bus
) -> None:
    """The shop widened its id; the operator dropped only checkout_session_check."""
    server_shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(20) NOT NULL")
    passes = publishing_passes(server_shop, clock, all_paid(), bus)
    server_shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(191) NOT NULL")
    server_shop.run("DROP TABLE checkout_session_check")
    long_id = "s" * 150
    add_sessions(server_shop, {**numbered(SESSIONS), long_id: "checkout_active_1"})
    for _ in range(3):
        await passes.run()
        clock.advance(5)
    assert set(statuses(server_shop).values()) == {"success"}
    assert_published_and_logged(server_shop, bus, [*numbered(SESSIONS), long_id])


async def test_a_checkout_id_of_70_000_characters_is_closed_and_logged(
    server_shop: Shop, clock: FakeClock, bus: Bus
) -> None:
    server_shop.run("ALTER TABLE checkout_session MODIFY billing_checkout_id MEDIUMTEXT")
    add_sessions(server_shop, numbered(SESSIONS))
    checkout = "€" * 70_000
    server_shop.run(
        f"UPDATE checkout_session SET billing_checkout_id = %s WHERE id = '{BAD}'", (checkout,)
    )
    billing = all_paid()
    billing.answers[checkout] = PAID
    summary = await publishing_passes(server_shop, clock, billing, bus).run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS}
    assert_published_and_logged(server_shop, bus, list(numbered(SESSIONS)))


async def test_many_refused_rows_among_many_delay_no_other(
    server_shop: Shop, clock: FakeClock, bus: Bus
) -> None:
    """One of each seven of 200, so that no group is made together."""
    add_sessions(server_shop, numbered(200))
    server_shop.run(
        "CREATE TRIGGER audit BEFORE UPDATE ON checkout_session FOR EACH ROW"
        " BEGIN IF SUBSTRING(OLD.id, 2) % 7 = 0 THEN SIGNAL SQLSTATE '45000'"
        " SET MYSQL_ERRNO = 30001; END IF; END"
    )
    summary = await publishing_passes(server_shop, clock, all_paid(200), bus).run()
    refused = {f"s{n}" for n in range(0, 200, 7)}
    assert summary.outcomes == {Outcome.CLOSED: 200 - len(refused), Outcome.REFUSED: len(refused)}
    assert {i for i, status in statuses(server_shop).items() if status == "open"} == refused
    assert_published_and_logged(server_shop, bus, sorted({*numbered(200)} - refused))
