"""Type-check the package: `python tools/typecheck.py [pyrefly options]`.

On import the rooms at the top of the repository are one package (`ir/` is `effc.ir`), by an import
hook that no static tool follows. This lays the same package out as links under `build/types`,
checks that, and prints the real paths. Editors can use the same folder as an extra search path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIEW = Path("build/types/effc")
ROOMS = ("backends", "benchmarks", "codegen", "examples", "ir", "passes")
UNCHECKED = {"examples"}  # models in plain torch, whose submodules no checker knows the type of


def lay_out() -> list[str]:
    """Make `build/types/effc`: what is in compiler/, and the other rooms as its sub-packages."""
    package = ROOT / VIEW
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    parts = [p for p in (ROOT / "compiler").iterdir() if p.name != "__pycache__"]
    parts += [ROOT / room for room in ROOMS]
    for path in parts:
        (package / path.name).symlink_to(path)
    return sorted(f"{VIEW}/{p.name}" for p in parts if p.is_dir() or p.suffix == ".py")


def real_paths(text: str) -> str:
    for room in ROOMS:
        text = text.replace(f"{VIEW}/{room}/", f"{room}/")
    return text.replace(f"{VIEW}/", "compiler/")


def main(options: list[str]) -> int:
    files = [path for path in lay_out() if Path(path).name not in UNCHECKED]
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path"]
    command += [sys.executable, *options, *files]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print(real_paths(done.stdout), end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
