"""`make mutants`: break one guard of the core at a time, by hand; the suite has to notice each.

Each is run in a copy of the tree, against the tests that are about the guard, and where those do
not notice, against all that are about the core. Where breaking it changes nothing, nobody may
notice. Not part of CI: it takes half an hour.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORE = "tests/core/test_store.py"
MONITOR = "tests/core/test_monitor.py"
CHANGES = "tests/core/test_changes.py tests/core/test_status_changes.py"
PAUSE = "tests/core/test_pause.py"
LEADER = "tests/core/test_leader.py"
CONNECTION = "tests/core/test_mysql_connection.py"
MYSQL = "tests/core/test_mysql.py"
BILLING = "tests/core/test_billing.py"
WHOLE = "tests/core tests/chaos tests/handlers tests/test_http2.py"
LONGEST_SECONDS = 30 * 60  # of one run of tests; several times what the whole takes


@dataclass(frozen=True)
class Mutant:
    """A guard that is broken: `old`, which stands once in the file, becomes `new`."""

    what: str
    file: str
    old: str
    new: str
    tests: str
    nothing: str = ""  # why breaking it changes nothing, where nobody can notice


MUTANTS = [
    # claim and lease
    Mutant("a claim is not kept", "queue.py", "(until,),", "(now,),", STORE),
    Mutant(
        "a claim takes what is claimed",
        "queue.py",
        'f" WHERE {condition} AND {UNCLAIMED}"',
        'f" WHERE {condition} AND %s IS NOT NULL"',
        STORE,
    ),
    Mutant(
        "a lease never ends",
        "queue.py",
        '"(claimed_until IS NULL OR claimed_until <= %s)"',
        '"(claimed_until IS NULL OR %s IS NULL)"',
        STORE,
    ),
    Mutant(
        "a lease is as long as a quick request takes",
        "monitor.py",
        "BEGIN_WITHIN_SECONDS + settings.request_timeout_seconds + RECORD_WITHIN_SECONDS",
        "BEGIN_WITHIN_SECONDS + RECORD_WITHIN_SECONDS",
        MONITOR,
    ),
    Mutant(
        "what is not due is claimed",
        "queue.py",
        '"next_check_at <= %s"',
        '"(next_check_at <= %s OR TRUE)"',
        STORE,
    ),
    Mutant(
        "what is due at the tick waits for a database's clock that is behind",
        "queue.py",
        "(max(now, tick),)",
        "(now,)",
        STORE,
    ),
    Mutant(
        "a pass that takes long claims only what was due when it began",
        "queue.py",
        "(max(now, tick),)",
        "(tick,)",
        LEADER,
    ),
    Mutant(
        "what is due behind closed sessions waits",
        "queue.py",
        "while found == limit and not claims:",
        "for _ in range(1):",
        STORE,
    ),
    Mutant(
        "a manual pass checks what has been checked since it began",
        "queue.py",
        '"(last_checked_at IS NULL OR last_checked_at <= %s)"',
        '"%s IS NOT NULL"',
        STORE,
    ),
    Mutant(
        "a check in the millisecond in which a manual pass begins counts as older",
        "queue.py",
        "max(now, claimed_at + _AFTER_CLAIM)",
        "now",
        STORE,
    ),
    Mutant(
        "the most overdue are not first",
        "queue.py",
        'f" ORDER BY next_check_at LIMIT {limit:d}',
        'f" LIMIT {limit:d}',
        STORE,
    ),
    Mutant(
        "any session tells how late the monitor is",
        "queue.py",
        '" ORDER BY next_check_at LIMIT 1)"',
        '" LIMIT 1)"',
        STORE,
    ),
    Mutant(
        "rows that another worker is claiming are waited for",
        "queue.py",
        "LIMIT {limit:d} {self._database.lock_rows}",
        "LIMIT {limit:d} {self._database.lock_rows_or_wait}",
        MYSQL,
    ),
    Mutant(
        "rows are claimed without a lock",
        "queue.py",
        "LIMIT {limit:d} {self._database.lock_rows}",
        "LIMIT {limit:d}",
        MYSQL,
    ),
    Mutant(
        "a lapsed claim is recorded",
        "queue.py",
        'f" WHERE claimed_until = %s AND rowid IN {listed(some)}",\n                        (\n',
        'f" WHERE %s IS NOT NULL AND rowid IN {listed(some)}",\n                        (\n',
        STORE,
    ),
    Mutant(
        "another's claim is given back",
        "queue.py",
        '" SET claimed_until = NULL"\n                        f" WHERE claimed_until = %s',
        '" SET claimed_until = NULL"\n                        f" WHERE %s IS NOT NULL',
        STORE,
    ),
    Mutant(
        "a closed session is asked about",
        "queue.py",
        "CASE WHEN s.status = 'open' THEN",
        "CASE WHEN TRUE THEN",
        STORE,
    ),
    Mutant("a claim is not given back", "recorder.py", "self._give_back_rest)", "dict)", MONITOR),
    Mutant(
        "what was not begun in time is not given back",
        "recorder.py",
        "self._store.queue.release(settled.unwanted)",
        "pass",
        MONITOR,
    ),
    Mutant(
        "a claim is held only where it is awaited",
        "recorder.py",
        "            self._held |= {claim.session_id: claim for claim in claims}\n"
        "            return pause, claims\n\n"
        "        pause, claims = await self._database.run(claim_unless_paused)\n",
        "            return pause, claims\n\n"
        "        pause, claims = await self._database.run(claim_unless_paused)\n"
        "        self._held |= {claim.session_id: claim for claim in claims}\n",
        f"{MONITOR}::test_a_pass_told_to_stop_behind_a_slow_claim_loses_no_result_and_leaves_no_claim",
    ),
    Mutant(
        "a pass that is told twice to stop leaves its last write",
        "recorder.py",
        "await _uncut(writing)",
        "await writing",
        MONITOR,
    ),
    Mutant(
        "a claim is given back for the one before it",
        "recorder.py",
        "if self._held.get(claim.session_id) is claim:",
        "if claim.session_id in self._held:",
        MONITOR,
    ),
    Mutant(
        "a pass that has closed claims",
        "recorder.py",
        "if self._closing or self._is_news(pause) else",
        "if self._is_news(pause) else",
        MONITOR,
    ),
    # compare and set
    Mutant(
        "an old session times out though billing has said nothing",
        "decision.py",
        "if new_status is SessionStatus.OPEN:",
        "if new_status in (SessionStatus.OPEN, None):",
        CHANGES,
    ),
    Mutant(
        "a status is updated without asking whether it is still open",
        "changes.py",
        "STILL_OPEN = \"COALESCE(status, '') = 'open'\"",
        'STILL_OPEN = "TRUE"',
        CHANGES,
    ),
    Mutant(
        "a session that the shop has closed is told as changed",
        "changes.py",
        'f" WHERE {STILL_OPEN} AND id IN {marks(session_ids)} {self._database.lock_rows}"',
        'f" WHERE id IN {marks(session_ids)} {self._database.lock_rows}"',
        CHANGES,
    ),
    Mutant(
        "the UPDATE itself does not ask whether the session is still open",
        "changes.py",
        'f" WHERE {STILL_OPEN} AND id IN {marks(session_ids)}",\n                (status',
        'f" WHERE id IN {marks(session_ids)}",\n                (status',
        CHANGES,
        nothing="the row was found open and has been locked since, in the same transaction",
    ),
    Mutant(
        "the shop's row is not locked",
        "changes.py",
        "{marks(session_ids)} {self._database.lock_rows}",
        "{marks(session_ids)}",
        CHANGES,
    ),
    Mutant(
        "another checkout's answer closes a session",
        "changes.py",
        "if row.billing_checkout_id != _asked(by_id[i])",
        "if False",
        CHANGES,
    ),
    Mutant(
        "a session's new checkout waits for the old one's turn",
        "changes.py",
        "by_id[i]._replace(next_check_at=now) for i in unlike",
        "by_id[i] for i in unlike",
        CHANGES,
    ),
    Mutant(
        "a lapsed claim changes a status",
        "changes.py",
        'f" WHERE claimed_until = %s AND rowid IN {listed(rowids)}"',
        'f" WHERE %s IS NOT NULL AND rowid IN {listed(rowids)}"',
        CHANGES,
    ),
    Mutant(
        "a claim may go to another worker while its change is made",
        "changes.py",
        "{self._database.lock_rows_or_wait}",
        "",
        CHANGES,
    ),
    Mutant("a locked row counts as closed", "changes.py", "and i not in locked]", "]", CHANGES),
    Mutant(
        "a refused row holds up the others",
        "changes.py",
        "if len(results) > 1:",
        "if False:",
        CHANGES,
    ),
    Mutant(
        "a refused row does not back off",
        "changes.py",
        "self._queue.record_as({Outcome.REFUSED: results}, self._database.now())",
        "None",
        CHANGES,
    ),
    Mutant(
        "a change that was not made counts as success",
        "model.py",
        "(Outcome.ACTIVE, Outcome.CLOSED, Outcome.NOT_FOUND)",
        "(Outcome.ACTIVE, Outcome.CLOSED, Outcome.DEFERRED, Outcome.NOT_FOUND)",
        CHANGES,
    ),
    # publish before commit
    Mutant(
        "what is not published is changed",
        "changes.py",
        "if len(taken) < len(results):",
        "if False:",
        CHANGES,
    ),
    Mutant(
        "what is not published is not rolled back",
        "changes.py",
        'self._database.execute("ROLLBACK TO SAVEPOINT unwritten")',
        "pass",
        CHANGES,
    ),
    Mutant(
        "a change that was not made waits its whole cadence step",
        "changes.py",
        "*(_at_next_slot(by_id[i]) for",
        "*(by_id[i] for",
        CHANGES,
    ),
    Mutant(
        "published before it is written",
        "changes.py",
        "        self._write(results)\n        published = self._publisher.publish(changes)",
        "        published = self._publisher.publish(changes)\n        self._write(results)",
        CHANGES,
    ),
    Mutant(
        "committed before it is published",
        "changes.py",
        "        published = self._publisher.publish(changes)",
        '        for sql in ("COMMIT", "BEGIN", "SAVEPOINT unwritten"):\n'
        "            self._database.execute(sql)\n"
        "        published = self._publisher.publish(changes)",
        CHANGES,
    ),
    # pause
    Mutant(
        "a 429 does not stop its own pass",
        "recorder.py",
        "self._limited = True",
        "pass",
        PAUSE,
    ),
    Mutant(
        "a 429 is not recorded at once",
        "recorder.py",
        "self._limited = True\n            self._hurry.set()",
        "self._limited = True",
        PAUSE,
    ),
    Mutant("a 429 pauses nobody", "recorder.py", "if limited:", "if False:", PAUSE),
    Mutant(
        "another worker's pause is not heard",
        "recorder.py",
        "return pause.until > self._pause.until",
        "return False",
        PAUSE,
    ),
    Mutant(
        "another worker's pause is not heard while recording",
        "recorder.py",
        "self._hear_of(pause)\n        if settled",
        "if settled",
        PAUSE,
    ),
    Mutant(
        "another worker's pause is not heard while claiming",
        "recorder.py",
        "self._hear_of(pause)\n        return claims",
        "return claims",
        PAUSE,
    ),
    Mutant(
        "a pass claims during a pause",
        "recorder.py",
        "if self._closing or self._is_news(pause) else",
        "if self._closing else",
        PAUSE,
    ),
    Mutant(
        "a pass that begins does not heed a pause",
        "store.py",
        "return self.pause.until if self.pause.until > self.now else None",
        "return None",
        PAUSE,
    ),
    Mutant(
        "of the 429s of one batch the shortest counts",
        "recorder.py",
        "max(asked, default=None)",
        "min(asked, default=None)",
        MONITOR,
    ),
    Mutant("a pause is made shorter", "shared.py", "max(until, paused.until)", "until", PAUSE),
    Mutant(
        "of two pauses at once the last one stands",
        "shared.py",
        'self._database.execute("UPDATE checkout_session_pause SET pauses = pauses WHERE id = 1")',
        "pass",
        PAUSE,
    ),
    Mutant(
        "blind pauses grow for ever",
        "shared.py",
        "Pause(paused.until, 0) if",
        "paused if",
        PAUSE,
    ),
    Mutant(
        "each 429 of a wave makes the pause longer",
        "shared.py",
        "again = paused.until > now",
        "again = False",
        PAUSE,
    ),
    Mutant(
        "errors end a row of pauses",
        "recorder.py",
        "any(not result.answer.outcome.is_error for result in results)",
        "bool(results)",
        PAUSE,
    ),
    Mutant(
        "an old pause's end ends a newer one's count",
        "shared.py",
        "if paused.until == ended.until else paused",
        "if ended else paused",
        PAUSE,
    ),
    Mutant(
        "a pause that is news is followed by the end of the one before it",
        "recorder.py",
        "self._pause.in_a_row and not self._is_news(pause):",
        "self._pause.in_a_row:",
        PAUSE,
        nothing="the end of a pause leaves a newer one as it is",
    ),
    # leader
    Mutant("every worker leads", "shared.py", "return led > 0", "return True", LEADER),
    Mutant(
        "a tick is led again",
        "shared.py",
        "(last_tick IS NULL OR last_tick < %s OR last_tick > %s)",
        "(%s IS NOT NULL OR %s IS NOT NULL)",
        LEADER,
    ),
    Mutant(
        "a clock that went wrong stops the ticks",
        "store.py",
        "or led > soon)",
        ")",
        LEADER,
    ),
    Mutant(
        "a clock that went wrong has led for ever",
        "shared.py",
        " OR last_tick > %s)",
        " OR %s IS NULL)",
        LEADER,
    ),
    Mutant(
        "a tick of another time is believed",
        "store.py",
        "abs(now - tick) <= interval",
        "True",
        MONITOR,
    ),
    Mutant("a manual pass leads", "store.py", "leads = may_lead and (", "leads = (", LEADER),
    Mutant(
        "the row that all share is not put back", "shared.py", "if not rows:", "if False:", LEADER
    ),
    # the size of a crew
    Mutant(
        "a crew is larger than it may be",
        "crew.py",
        "min(math.ceil(due / self._share), self._settings.max_workers)",
        "math.ceil(due / self._share)",
        LEADER,
    ),
    Mutant(
        "workers under way are not counted",
        "crew.py",
        "max(0, wanted - self._under_way)",
        "max(0, wanted - 1)",
        LEADER,
    ),
    Mutant(
        "errors are a reason for more workers",
        "crew.py",
        "if answer.outcome.is_error or answer.seconds is None:",
        "if answer.seconds is None:",
        LEADER,
    ),
    Mutant(
        "each answer starts workers",
        "crew.py",
        "return self._healthy == self._settings.max_concurrency",
        "return self._healthy >= self._settings.max_concurrency",
        LEADER,
    ),
    Mutant(
        "a helper starts helpers",
        "monitor.py",
        "if start_worker and view.leads else None",
        "if start_worker else None",
        LEADER,
    ),
    Mutant(
        "where all workers are under way one more checks",
        "monitor.py",
        "if under_way >= settings.max_workers:",
        "if False:",
        LEADER,
    ),
    Mutant(
        "a worker that was killed counts",
        "runs.py",
        "+ timedelta(milliseconds=integer(so_far)) >= since",
        "+ timedelta(milliseconds=integer(so_far)) is not None",
        LEADER,
    ),
    Mutant(
        "a pass under way does not say so",
        "recorder.py",
        "if loop.time() - told >= PROGRESS_EVERY_SECONDS:",
        "if False:",
        MONITOR,
    ),
    Mutant(
        "a pass that begins may have two rows",
        "runs.py",
        'f"{self._database.insert_or_ignore} INTO checkout_session_run',
        'f"INSERT INTO checkout_session_run',
        MYSQL,
    ),
    # deadline
    Mutant(
        "checks begin after the deadline",
        "monitor.py",
        "return self._loop.time() < until and not",
        "return not",
        MONITOR,
    ),
    Mutant(
        "a claim that comes after the deadline is not given back",
        "monitor.py",
        "self._recorder.give_back((await ahead).claims)",
        "await ahead",
        MONITOR,
    ),
    Mutant(
        "a claim waits for a free hand as long as the pass lasts",
        "monitor.py",
        "min(asked + BEGIN_WITHIN_SECONDS, self._begin_until)",
        "self._begin_until",
        MONITOR,
    ),
    Mutant(
        "a pass all of whose requests hang goes on claiming",
        "monitor.py",
        "if hang or not self._may_begin(self._begin_until):",
        "if not self._may_begin(self._begin_until):",
        MONITOR,
    ),
    Mutant(
        "a pass does not end",
        "monitor.py",
        "asyncio.timeout_at(ends)",
        "asyncio.timeout(None)",
        MONITOR,
    ),
    Mutant(
        "a manual pass begins checks until its end",
        "monitor.py",
        "start_seconds = max(1.0, MANUAL_SECONDS - settings.request_timeout_seconds)",
        "start_seconds = MANUAL_SECONDS",
        MONITOR,
    ),
    Mutant(
        "the last check has not its whole time",
        "worker.py",
        "max(1.0, total - self._settings.request_timeout_seconds)",
        "total",
        MONITOR,
    ),
    Mutant(
        "no time is left to record",
        "worker.py",
        "max(1.0, seconds - FINISH_SECONDS)",
        "seconds",
        MONITOR,
    ),
    # the connection
    Mutant(
        "the server's isolation",
        "mysql_connection.py",
        'init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"',
        'init_command="DO 0"',
        CONNECTION,
    ),
    Mutant(
        "the server's lock wait",
        "mysql_connection.py",
        "SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}",
        "DO {LOCK_WAIT_SECONDS}",
        CONNECTION,
    ),
    Mutant("a standby is kept", "mysql.py", " or code in _STANDBY", "", CONNECTION),
    Mutant("a stale one is kept", "mysql.py", "code in _STALE or ", "", CONNECTION),
    Mutant(
        "a connection that failed is used again",
        "mysql.py",
        "self._drop()\n                if kept and",
        "if kept and",
        CONNECTION,
    ),
    Mutant(
        "fresh connections are tried again and again",
        "mysql.py",
        "if kept and not last and (",
        "if not last and (",
        CONNECTION,
    ),
    Mutant(
        "a deadlock is not tried again",
        "mysql.py",
        "if code in _LOCKED and self._rolled_back() and not last:",
        "if False:",
        CONNECTION,
    ),
    Mutant(
        "a refused value is a database that cannot be used",
        "mysql.py",
        "if _refuses_values(error, code) and self._rolled_back():",
        "if False:",
        CHANGES,
    ),
    Mutant(
        "a rotated password is not found",
        "mysql.py",
        "self._address(refresh=True)",
        "self._address(refresh=False)",
        MYSQL,
    ),
    Mutant(
        "certificates are not checked",
        "mysql_connection.py",
        "_verifying(address.ssl_ca) if address.ssl else None",
        "None",
        CONNECTION,
    ),
    Mutant(
        "the host's name is not checked",
        "mysql_connection.py",
        "    return context\n",
        "    context.check_hostname = False\n    return context\n",
        CONNECTION,
    ),
    # billing
    Mutant("a body is not closed", "billing.py", "await response.aclose()", "pass", BILLING),
    Mutant(
        "a body that is closed is sent on",
        "transport.py",
        "await self._sending.__aexit__(None, None, None)",
        "pass",
        BILLING,
    ),
    Mutant("a body is read on", "billing.py", "> MAX_BODY_BYTES", "> 2**62", BILLING),
    Mutant(
        "a key is read again for as long as it takes",
        "billing.py",
        "asyncio.timeout(started + self._timeout_seconds - self._monotonic())",
        "asyncio.timeout(None)",
        BILLING,
    ),
    Mutant(
        "a request that is sent again has all its time anew",
        "transport.py",
        "timedelta(seconds=max(0, left))",
        "timedelta(seconds=self._timeout_seconds)",
        BILLING,
    ),
    Mutant(
        "a request takes as long as it likes",
        "transport.py",
        "        .timeout(timedelta(seconds=timeout_seconds))\n",
        "",
        BILLING,
    ),
    Mutant(
        "redirects are followed",
        "transport.py",
        "redirects(enable=False)",
        "redirects(enable=True)",
        BILLING,
    ),
    Mutant(
        "a reset connection costs a check",
        "transport.py",
        ', "Connection reset by peer"',
        "",
        BILLING,
    ),
    Mutant(
        "a connection that was closed just then costs a check",
        "transport.py",
        '"connection closed before message completed", ',
        "",
        BILLING,
    ),
    Mutant(
        "a retry takes another kept connection",
        "transport.py",
        "return await self._send(self._unkept, request, began)",
        "return await self._send(self._either, request, began)",
        BILLING,
    ),
    Mutant(
        "descriptors are not bounded",
        "transport.py",
        ".max_connections(MAX_CONNECTIONS)",
        ".max_connections(None)",
        "tests/core/test_descriptors.py",
    ),
    Mutant(
        "Retry-After is not bounded",
        "billing.py",
        "min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)",
        "max(0.0, seconds)",
        BILLING,
    ),
    Mutant(
        "Retry-After may be a date that none is",
        "billing.py",
        "except (ValueError, OverflowError):",
        "except ValueError:",
        BILLING,
    ),
]


def run(mutant: Mutant, *, quick: bool) -> str:
    """Who noticed it: a test, or nobody."""
    with _copy() as tree:
        path = tree / "src" / "core" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return "?? the code has changed: mend this mutant"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return _failure(tree, mutant.tests) or ("" if quick else _failure(tree, WHOLE))


@contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        skip = shutil.ignore_patterns(
            ".git", ".venv", ".uv", "node_modules", "__pycache__", ".*_cache", ".hypothesis"
        )
        shutil.copytree(ROOT, tree, ignore=skip)
        yield tree


def _failure(tree: Path, tests: str) -> str:
    """The first of the tests that fails in that tree, or nothing."""
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "?? the tests have not come to an end: bound the one that hangs"
    if not ran.returncode:
        return ""
    # Not what it has logged: such lines begin with ERROR, too.
    failed = re.search(r"^(?:FAILED|ERROR) tests/\S+?::(.+?)(?: - |$)", ran.stdout, re.MULTILINE)
    return failed[1] if failed else f"?? pytest ended with {ran.returncode}: {ran.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="those whose description holds this")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests that are about the guard"
    )
    parser.add_argument("--at-once", type=int, default=1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.what]
    with _copy() as tree:
        if failing := _failure(tree, " ".join(sorted({mutant.tests for mutant in chosen}))):
            print(f"{failing} fails though nothing is broken")
            return 1
    wrong = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        for mutant, noticed in zip(
            chosen, pool.map(partial(run, quick=options.quick), chosen), strict=True
        ):
            wrong += noticed.startswith("??") or bool(noticed) is bool(mutant.nothing)
            nobody = f"changes nothing: {mutant.nothing}" if mutant.nothing else "NOBODY NOTICED"
            print(f"{mutant.what}: {noticed or nobody}", flush=True)
    nothing = sum(bool(mutant.nothing) for mutant in chosen)
    print(f"{len(chosen)} guards, {nothing} of which change nothing when broken; {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
