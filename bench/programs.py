"""The programs that are measured: the command of each, and its running process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.jobs import Job, Report

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Program:
    """A client: the command that runs it, and the database engine of its passes."""

    label: str
    command: tuple[str, ...]
    engine: str = ""
    checkout: Path | None = None  # of the monitor; None: it is another program

    def of(self, checkout: Path) -> "Program":
        """The same program in another checkout of the monitor."""
        label = self.label.replace("ours", "before")
        return Program(label, self.command, self.engine, checkout)


def _ours(label: str, name: str, engine: str = "") -> Program:
    # -S leaves out the packages of the development environment.
    command = (sys.executable, "-S", "-m", "bench.clients", name)
    return Program(f"ours, {label}", command, engine, ROOT)


_NODE = ("node", str(Path(__file__).with_name("clients.mjs")))
_ALTERNATIVES = (sys.executable, "-m", "bench.alternatives")
HTTP = _ours("HTTP part", "http")
MARIADB = _ours("full pass on MariaDB", "pass", "mariadb")
MYSQL = _ours("full pass on MySQL", "pass", "mysql")
SQLITE = _ours("full pass on SQLite", "pass", "sqlite")
NODE_ALL = Program("Node, fetch, Promise.allSettled", (*_NODE, "all"))
NODE_BOUNDED = Program("Node, fetch, bounded", (*_NODE, "bounded"))
AIOHTTP = Program("aiohttp", (*_ALTERNATIVES, "aiohttp"))
WRK = Program("wrk, the limit", (*_ALTERNATIVES, "wrk"))


class Client:
    """A running program; the modules of its Python are in `path`."""

    def __init__(
        self, program: Program, cores: Sequence[int], authority: Path, path: Sequence[Path]
    ) -> None:
        self.program = program
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "SSL_CERT_FILE": str(authority),
            "NODE_EXTRA_CA_CERTS": str(authority),
        }
        self._process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), *program.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def start(self, job: Job) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def line(self) -> Report:
        """The next line: a job's report, or a request to start another worker."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.program.label} ended with {self._process.wait()}")
        message: Report = json.loads(line)
        return message

    def report(self) -> Report:
        while "start" in (message := self.line()):
            pass
        return message

    def run(self, job: Job) -> Report:
        self.start(job)
        return self.report()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
