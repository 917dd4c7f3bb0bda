"""The Lambda package contains what the lock file says."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_packages_requirements_match_the_lock_file() -> None:
    """If this fails, run `make requirements`."""
    makefile = (ROOT / "Makefile").read_text()
    [export] = re.findall(
        r"^\t\$\(UV\) (export .*) -o src/requirements.txt$", makefile, re.MULTILINE
    )
    uv = shutil.which("uv") or ROOT / ".uv/bin/uv"

    exported = subprocess.run(
        [uv, *shlex.split(export), "--offline"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert (ROOT / "src/requirements.txt").read_text() == exported


def test_boto3_is_not_packaged() -> None:
    assert "boto" not in (ROOT / "src/requirements.txt").read_text()
