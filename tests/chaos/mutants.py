"""`make mutants`: break one guard of the core at a time, by hand; the suite has to notice each.

Each is run in a copy of the tree, against the tests that are about the guard, and where those do
not notice, against the whole suite. Not part of CI: it takes a quarter of an hour.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUEUE = "tests/core/test_store.py tests/core/test_monitor.py tests/core/test_interleavings.py"
CHANGES = (
    "tests/core/test_changes.py tests/core/test_status_changes.py"
    " tests/chaos/test_database_faults.py::"
    "test_a_row_that_the_shops_database_refuses_holds_up_no_other"
)
PAUSE = "tests/core/test_pause.py"
MYSQL = "tests/core/test_mysql_connection.py tests/core/test_mysql.py"
BILLING = "tests/core/test_billing.py tests/core/test_descriptors.py"
WHOLE = "tests/core tests/chaos"


@dataclass(frozen=True)
class Mutant:
    """A guard that is broken: `old` becomes `new` where it stands first in the file."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # claim and lease
    Mutant("a claim is not kept", "queue.py", "(until, *(claim", "(now, *(claim", QUEUE),
    Mutant("a claim takes what is claimed", "queue.py", "AND {UNCLAIMED}", "AND TRUE OR %s", QUEUE),
    Mutant(
        "a lease never ends",
        "queue.py",
        "(claimed_until IS NULL OR claimed_until <= %s)",
        "(claimed_until IS NULL OR %s IS NULL)",
        QUEUE,
    ),
    Mutant(
        "what is not due is claimed",
        "queue.py",
        '"next_check_at <= %s"',
        '"(next_check_at <= %s OR TRUE)"',
        QUEUE,
    ),
    Mutant(
        "the most overdue are not first", "queue.py", "ORDER BY next_check_at LIMIT", "LIMIT", QUEUE
    ),
    Mutant(
        "a lapsed claim is recorded",
        "queue.py",
        'f" WHERE claimed_until = %s AND session_id IN {marks(some)}",\n'
        "                        (\n",
        'f" WHERE %s IS NOT NULL AND session_id IN {marks(some)}",\n                        (\n',
        QUEUE,
    ),
    Mutant(
        "another's claim is given back",
        "queue.py",
        '" SET claimed_until = NULL"\n                        f" WHERE claimed_until = %s',
        '" SET claimed_until = NULL"\n                        f" WHERE %s IS NOT NULL',
        QUEUE,
    ),
    Mutant(
        "a closed session is asked about",
        "queue.py",
        "CASE WHEN s.status = 'open' THEN",
        "CASE WHEN TRUE THEN",
        QUEUE,
    ),
    Mutant("a claim is not given back", "recorder.py", "self._give_back_rest)", "dict)", QUEUE),
    # compare and set, publish before commit
    Mutant(
        "a closed session is changed",
        "changes.py",
        'f" WHERE {STILL_OPEN} AND id IN {marks(session_ids)} {self._database.lock_rows}"',
        'f" WHERE id IN {marks(session_ids)} {self._database.lock_rows}"',
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
        "a lapsed claim changes a status",
        "changes.py",
        'f" WHERE claimed_until = %s AND session_id IN {marks(ids)}"',
        'f" WHERE %s IS NOT NULL AND session_id IN {marks(ids)}"',
        CHANGES,
    ),
    Mutant(
        "what is not published is changed",
        "changes.py",
        "if len(taken) < len(results):",
        "if False:",
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
        "a refused row holds up the others",
        "changes.py",
        "if len(results) > 1:",
        "if False:",
        CHANGES,
    ),
    Mutant("a locked row counts as closed", "changes.py", "and i not in locked]", "]", CHANGES),
    # pause
    Mutant("a 429 is not recorded at once", "recorder.py", "self._limited = True", "pass", PAUSE),
    Mutant("a 429 pauses nobody", "recorder.py", "if limited:", "if False:", PAUSE),
    Mutant(
        "another worker's pause is not heard",
        "recorder.py",
        "return pause.until > self._pause.until",
        "return False",
        PAUSE,
    ),
    Mutant("a pause is made shorter", "shared.py", "max(until, paused.until)", "until", PAUSE),
    Mutant("a pause never ends", "shared.py", "Pause(paused.until, 0) if", "paused if", PAUSE),
    # leader
    Mutant(
        "every worker leads",
        "shared.py",
        "return led > 0",
        "return True",
        "tests/core/test_leader.py tests/core/test_interleavings.py",
    ),
    # deadline
    Mutant(
        "checks begin after the deadline",
        "monitor.py",
        "return self._loop.time() < until and not",
        "return not",
        QUEUE,
    ),
    Mutant(
        "claims beyond the deadline are kept",
        "monitor.py",
        "self._recorder.give_back((await ahead).claims)",
        "await ahead",
        QUEUE,
    ),
    # the connection
    Mutant(
        "the server's isolation",
        "mysql_connection.py",
        'init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"',
        'init_command="DO 0"',
        MYSQL,
    ),
    Mutant(
        "the server's lock wait",
        "mysql_connection.py",
        "SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}",
        "DO {LOCK_WAIT_SECONDS}",
        MYSQL,
    ),
    Mutant("a standby is kept", "mysql.py", "or code in _STANDBY", "", MYSQL),
    Mutant(
        "the host's name is not checked",
        "mysql_connection.py",
        "    return context\n",
        "    context.check_hostname = False\n    return context\n",
        MYSQL,
    ),
    # billing
    Mutant("a body is not closed", "billing.py", "await response.aclose()", "pass", BILLING),
    Mutant("a body is read on", "billing.py", "> MAX_BODY_BYTES", "> 2**62", BILLING),
    Mutant("redirects are followed", "transport.py", "enable=False)", "enable=True)", BILLING),
    Mutant(
        "a retry takes another kept connection",
        "transport.py",
        "return await self._send(self._unkept, request)",
        "return await self._send(self._either, request)",
        BILLING,
    ),
    Mutant(
        "descriptors are not bounded",
        "transport.py",
        ".max_connections(MOST_CONNECTIONS)",
        ".max_connections(None)",
        BILLING,
    ),
    Mutant(
        "Retry-After is not bounded",
        "billing.py",
        "min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)",
        "max(0.0, seconds)",
        BILLING,
    ),
]


def run(mutant: Mutant, *, quick: bool) -> str:
    """Who noticed it: a test, or nobody."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        skip = shutil.ignore_patterns(
            ".git", ".venv", ".uv", "node_modules", "__pycache__", ".*_cache"
        )
        shutil.copytree(ROOT, copy, ignore=skip)
        path = copy / "src" / "core" / mutant.file
        text = path.read_text(encoding="utf-8")
        if mutant.old not in text:
            return "?? the code has changed: mend this mutant"
        path.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
        for tests in (mutant.tests,) if quick else (mutant.tests, WHOLE):
            ran = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    *tests.split(),
                ],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": f"{copy / 'src'}:{copy}"},
                capture_output=True,
                text=True,
                check=False,
            )
            if ran.returncode:
                failed = [
                    line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
                ]
                return (
                    failed[0].partition("::")[2].partition(" - ")[0]
                    if failed
                    else ran.stdout[-300:]
                )
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="those whose description holds this")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests that are about the guard"
    )
    parser.add_argument("--at-once", type=int, default=1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.what]
    unnoticed = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        for mutant, noticed in zip(
            chosen, pool.map(partial(run, quick=options.quick), chosen), strict=True
        ):
            unnoticed += not noticed or noticed.startswith("??")
            print(f"{mutant.what}: {noticed or 'NOBODY NOTICED'}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return unnoticed > 0


if __name__ == "__main__":
    sys.exit(main())
