"""`make build`: run `sam build` and add bytecode.

`sam build` ships no bytecode, and Lambda does not keep it between cold starts, so each cold start
would compile every module again. Python does not check this bytecode against its source
(unchecked-hash), because file times change on the way to Lambda.
"""

import argparse
import compileall
import os
import platform
import subprocess
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

BUILT = Path(".aws-sam/build")
ARCHITECTURE = "arm64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
FOR_THIS_MACHINE = ("--parameter-overrides", f"Architecture={ARCHITECTURE}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make build", description="Build the functions. Takes every option of `sam build`."
    )
    parser.add_argument("--build-dir", type=Path, default=BUILT)
    arguments, others = parser.parse_known_args()
    command = ["sam", "build", "--build-dir", os.fspath(arguments.build_dir), *others]
    built = subprocess.run(command, check=False)  # noqa: S603
    if built.returncode == 0:
        add_bytecode(arguments.build_dir)
    return built.returncode


def add_bytecode(built: Path) -> None:
    """Compile each function's directory with the paths that it has on Lambda."""
    for function in sorted(path for path in built.iterdir() if path.is_dir()):
        compileall.compile_dir(
            function,
            quiet=1,  # print errors only
            stripdir=os.fspath(function),
            prependdir="/var/task",
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        )


if __name__ == "__main__":
    sys.exit(main())
