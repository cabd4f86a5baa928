"""Type-check the package: `python tools/typecheck.py [pyrefly options]`.

On import the rooms at the top of the repository are one package (`ir/` is `effc.ir`), by an import
hook that no static tool follows. This lays the same package out as links under `build/types`, checks
that, and prints the real paths. Editors can use the same folder as an extra search path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIEW = Path("build/types")
ROOMS = ("backends", "codegen", "ir", "passes")


def lay_out() -> None:
    """Make `build/types/effc`: what is in compiler/, and the other rooms as its sub-packages."""
    package = ROOT / VIEW / "effc"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    parts = [p for p in (ROOT / "compiler").iterdir() if p.name != "__pycache__"]
    for path in [*parts, *(ROOT / room for room in ROOMS)]:
        (package / path.name).symlink_to(path)


def real_paths(text: str) -> str:
    for room in ROOMS:
        text = text.replace(f"{VIEW}/effc/{room}/", f"{room}/")
    return text.replace(f"{VIEW}/effc/", "compiler/")


def main(options: list[str]) -> int:
    lay_out()
    command = [sys.executable, "-m", "pyrefly", "check", *options, str(VIEW)]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print(real_paths(done.stdout), end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
