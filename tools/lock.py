"""Write constraints.txt from the environment this runs in: `python tools/lock.py`.

Pins exactly what `pip install -e ".[test,bench]"` brings, and nothing else that happens to be
installed. Python 3.10 gets the pin of torch only: the newest of most others need 3.11.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FREE = {
    "effc",
    "triton",
}  # triton: CUDA builds of torch pin their own; pyproject.toml has the range
HEAD = """\
# Exact versions that `make` installs; written by `make lock`.
# torch is the CPU or the CUDA build, whichever pip finds; `make TORCH=torch==X` takes another.
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
    version = metadata.version(name).partition("+")[0]  # the CPU build of torch is 2.13.0+cpu
    return f"{name}=={version}" + ("" if name == "torch" else '; python_version >= "3.11"')


def main() -> None:
    names = (closure("effc", "test") | closure("effc", "bench")) - FREE
    pins = [pin(name) for name in sorted(names, key=lambda n: (n != "torch", n))]
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    path.write_text(HEAD + "".join(f"{p}\n" for p in pins))
    print(f"{path.name}: {len(pins)} pins")


if __name__ == "__main__":
    main()
