"""The contents of the functions' package, as `make build` creates it."""

import importlib.util
import re
import struct
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.e2e.support import ROOT, build, show

MAX_BYTES = 45_000_000
AARCH64 = 183  # e_machine in an ELF file's header
UNCHECKED_HASH = 1  # bytecode flags: not checked against the source (PEP 552)


@pytest.mark.parametrize("function", ["CheckSessionsFunction", "ApiFunction"])
def test_package_is_small_and_holds_what_requirements_txt_lists(
    function: str, package: Path
) -> None:
    requirements = (ROOT / "src/requirements.txt").read_text()
    listed = set(re.findall(r"^([\w-]+)==", requirements, re.MULTILINE))

    installed = {
        found.name.lower().replace("_", "-")
        for found in distributions(path=[str(package / function)])
    }
    size = sum(file.stat().st_size for file in (package / function).rglob("*") if file.is_file())

    show(f"{function}: {size / 1e6:.1f} MB unpacked, with {', '.join(sorted(installed))}")
    assert installed == listed
    assert not {"boto3", "botocore"} & installed
    assert size < MAX_BYTES


@pytest.mark.parametrize("function", ["CheckSessionsFunction", "ApiFunction"])
def test_every_module_has_unchecked_bytecode(function: str, package: Path) -> None:
    modules = [*(package / function).rglob("*.py")]

    flags = set()
    for module in modules:
        bytecode = Path(importlib.util.cache_from_source(str(module))).read_bytes()
        magic, flag = struct.unpack_from("<4sI", bytecode)
        assert magic == importlib.util.MAGIC_NUMBER
        flags.add(flag)

    assert len(modules) > 100
    assert flags == {UNCHECKED_HASH}


def test_package_for_arm64_holds_only_arm64_binaries(tmp_path: Path) -> None:
    """The build needs no container on a machine with another processor."""
    package = build(tmp_path / "build", "--parameter-overrides", "Architecture=arm64")

    machines = {
        file.relative_to(package): struct.unpack_from("<H", file.read_bytes(), 18)[0]
        for file in package.rglob("*")
        if file.is_file() and file.read_bytes().startswith(b"\x7fELF")
    }
    show("\n".join(str(file) for file in machines))
    assert any("pyreqwest" in str(file) for file in machines)
    assert set(machines.values()) == {AARCH64}
