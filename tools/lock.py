"""Write constraints.txt from the environment this runs in: `python tools/lock.py`.

Pins exactly what `pip install -e ".[test,bench]"` brings, and nothing else that happens to be
installed. A pin that needs a newer Python than our oldest carries a marker, so pip is free there.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OLDEST = "3.10"
FREE = {"effc", "triton"}  # triton: CUDA builds of torch pin their own; pyproject.toml has the range
HEAD = """\
# Exact versions that `make` installs; written by `make lock`.
# torch is the CPU or the CUDA build, whichever pip finds here; `make TORCH=torch==X` changes it.
"""


def closure(name: str, extra: str) -> set[str]:
    """Every distribution that name[extra] needs on this machine, name itself included."""
    found: set[tuple[str, str]] = set()
    todo = [(name, extra)]
    while todo:
        name, extra = item = todo.pop()
        if item in found:
            continue
        found.add(item)
        for need in map(Requirement, metadata.requires(name) or ()):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(need.name), e) for e in ("", *need.extras)]
    return {name for name, _ in found}


def pin(name: str) -> str:
    about = metadata.distribution(name)
    version = about.version.partition("+")[0]  # the CPU build of torch calls itself 2.13.0+cpu
    needs = about.metadata.get("Requires-Python") or ""
    if SpecifierSet(needs).contains(f"{OLDEST}.99"):
        return f"{name}=={version}"
    lowest = re.search(r">=\s*(\d+\.\d+)", needs)
    assert lowest, f"{name}: Requires-Python is {needs!r}"
    return f'{name}=={version}; python_version >= "{lowest[1]}"'


def main() -> None:
    names = (closure("effc", "test") | closure("effc", "bench")) - FREE
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    pins = [pin(name) for name in sorted(names, key=lambda n: (n != "torch", n))]
    path.write_text(HEAD + "".join(f"{p}\n" for p in pins))
    print(f"{path.name}: {len(pins)} pins")


if __name__ == "__main__":
    main()
