"""Imports go one way: ir <- passes, ir <- codegen <- backends, compiler on top, examples, benchmarks.

Every import of a file counts: absolute or relative, inside functions, under TYPE_CHECKING, and
`import_module` with a literal name. Importing `effc` itself means importing `compiler/`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> the rooms it may import; compiler/ is `effc` itself
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "codegen": {"ir", "codegen"},
    "backends": {"ir", "codegen", "backends"},
    "compiler": {"ir", "passes", "codegen", "backends", "compiler", "examples", "benchmarks"},
    "examples": {"ir", "passes", "codegen", "backends", "compiler", "examples"},
    "benchmarks": {"ir", "passes", "codegen", "backends", "compiler", "examples", "benchmarks"},
}


def module_name(path: Path) -> tuple[str, ...]:
    """("effc", "ir", "ops", "linear") of ir/ops/linear.py; a package's __init__ keeps that part."""
    room, *rest = path.with_suffix("").parts
    return ("effc", *rest) if room == "compiler" else ("effc", room, *rest)


def imports(source: str, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything the source imports. `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = ".".join([*(module[:-level] if level else ()), *filter(None, [origin])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).rpartition(".")[2] in ("import_module", "__import__"):
                    dots = len(name) - len(name.lstrip("."))
                    yield node.lineno, ".".join([*module[:-dots], name[dots:]] if dots else [name])


def room_of(name: str) -> str | None:
    """The room an imported name is in; None for what is not ours."""
    top, *rest = name.split(".")
    if top == "effc":
        return rest[0] if rest and rest[0] in MAY_IMPORT else "compiler"
    return top if (ROOT / top).is_dir() else None


def violations(path: Path, source: str) -> list[str]:
    """What a file (path from the repository's root) imports and must not, a sentence each."""
    room = path.parts[0]
    found = []
    for line, name in imports(source, module_name(path)):
        target = room_of(name)
        if target is None:
            continue
        if not name.startswith("effc"):
            found.append(f"{path}:{line}: imports {name}; in the package write effc.…")
        elif target not in MAY_IMPORT[room]:
            found.append(f"{path}:{line}: {room} imports {name}, which is in {target}/")
    return found


def package_files() -> list[Path]:
    return sorted(p.relative_to(ROOT) for room in MAY_IMPORT for p in (ROOT / room).rglob("*.py"))


def test_imports_go_one_way() -> None:
    files = package_files()
    assert files
    found = [v for path in files for v in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(["imports against the direction of the house:", *found])


ALLOWED = [
    ("ir/graph.py", "import ast\nimport torch\nfrom .types import Tensor"),
    ("ir/__init__.py", "from . import ops\nfrom .graph import Graph"),
    ("ir/ops/linear.py", "from ..op import op\nfrom effc.ir.types import Tensor"),
    ("passes/analysis/liveness.py", "from ...ir import Graph\nfrom ..base import Pass"),
    ("backends/cpu/lower.py", "from effc.codegen import cpp\nimport effc.ir as ir"),
    (
        "compiler/__init__.py",
        "from .report import explain\nfrom effc.backends import cpu\nimport effc",
    ),
    ("compiler/cli.py", "from effc import explain, passes"),
    ("compiler/demo.py", "from effc.examples.rlfn import model"),
    ("examples/zoo/rlfn.py", "import effc\nfrom ..rlfn.model import RLFN"),
]
PLANTED = [
    ("ir/graph.py", "import effc"),
    ("ir/graph.py", "from effc import passes"),
    ("ir/graph.py", "from effc import Graph"),
    ("ir/graph.py", "import effc.passes.fold as f"),
    ("ir/graph.py", "from ..passes import fold"),
    ("ir/graph.py", "from .. import explain"),
    ("ir/__init__.py", "from ..codegen import build"),
    ("ir/ops/linear.py", "from ...backends.cpu import facts"),
    ("ir/ops/linear.py", "from ... import codegen"),
    ("ir/graph.py", "def f():\n    import effc.report"),
    ("ir/graph.py", "if TYPE_CHECKING:\n    from effc.passes import Pass"),
    ("ir/graph.py", "importlib.import_module('effc.passes')"),
    ("ir/graph.py", "import_module('..passes', __package__)"),
    ("ir/graph.py", "import passes"),
    ("ir/graph.py", "from tests.ir import strategies"),
    ("passes/fold.py", "from effc.codegen import build"),
    ("passes/fold.py", "import effc.backends.cpu"),
    ("passes/fold.py", "from effc.examples import zoo"),
    ("codegen/build.py", "from effc.passes import analysis"),
    ("codegen/cpp/render.py", "from ...backends import cpu"),
    ("backends/cpu/__init__.py", "from ...passes.analysis import liveness"),
    ("backends/cpu/lower.py", "from effc.report import Report"),
    ("compiler/cli.py", "from examples.rlfn import model"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


@pytest.mark.parametrize(("path", "source"), PLANTED)
def test_planted_violations_are_caught(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1
