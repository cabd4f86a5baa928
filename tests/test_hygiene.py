"""The repository itself: what is packaged, what text may say, where things lie."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"effc": "compiler"} | {
    f"effc.{r}": r for r in ("backends", "benchmarks", "codegen", "examples", "ir", "passes")
}
# Spelled in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.}/~-])/(?:work|root|home/\w+|Users/\w+)" + r"/[\w.]")
HOSTS = re.compile(
    "|".join(("pypi" + r"\.org", "python" + "hosted", "npm" + r"js\.", "download.py" + "torch"))
)
LARGEST = 2_000_000  # bytes of one file; the weights that the demo needs are 1 MB


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file of the repository that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return sorted(p for name in listed.split("\0") if name and (p := ROOT / name).is_file())


def lines_with(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    found = []
    for path in files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_paths_of_one_machine(files: list[Path]) -> None:
    found = lines_with(MACHINE_PATHS, files)
    assert not found, "\n".join(found)


def test_no_registry_hosts(files: list[Path]) -> None:
    found = lines_with(HOSTS, files)
    assert not found, "\n".join(found)


def test_no_large_files(files: list[Path]) -> None:
    large = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size}" for p in files if p.stat().st_size > LARGEST
    ]
    assert not large, "\n".join(large)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /wor" + "k/data", True),
        ('"/hom' + 'e/ann/x"', True),
        ("../shared/work/data", False),
        ("a/root/b", False),
        ("/tmp/x", False),
    ],
)
def test_machine_paths_are_recognised(text: str, found: bool) -> None:
    assert bool(MACHINE_PATHS.search(text)) == found


def test_pyproject_lists_every_package() -> None:
    """A folder with Python files is a package, has an __init__.py, and is in pyproject.toml."""
    folders = {
        ".".join([package, *path.parent.relative_to(ROOT / room).parts])
        for package, room in ROOMS.items()
        for path in (ROOT / room).rglob("*.py")
    }
    bare = [f for f in folders if not (folder_of(f) / "__init__.py").exists()]
    assert not bare, f"no __init__.py in {sorted(bare)}"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert declared["package-dir"] == ROOMS
    assert declared["packages"] == sorted(folders), (
        "packages in pyproject.toml should be:\n"
        + "\n".join(f'    "{f}",' for f in sorted(folders))
    )


def folder_of(package: str) -> Path:
    top, *rest = package.split(".")
    assert top == "effc"
    room = ROOT if f"effc.{rest[0] if rest else ''}" in ROOMS else ROOT / "compiler"
    return room.joinpath(*rest)


def test_tests_lie_where_their_subject_does() -> None:
    """tests/<folder>/… mirrors <folder>/…; golden text lies under the name of its test file."""
    tests = ROOT / "tests"
    stray = [
        path.relative_to(ROOT)
        for path in tests.rglob("test_*.py")
        if (folder := path.parent.relative_to(tests)).parts
        and folder.parts[0] != "models"  # whole models from outside, no room's own
        and not (ROOT / folder).is_dir()
    ]
    assert not stray, f"no such folder to test: {stray}"
    golden = tests / "golden"
    orphans = {p.parent for p in golden.rglob("*.txt")}
    orphans = {
        p for p in orphans if not (tests / p.relative_to(golden)).with_suffix(".py").exists()
    }
    assert not orphans, f"golden text without its test file: {sorted(orphans)}"


def test_constraints_pin_torch_first() -> None:
    pins = [
        s for s in (ROOT / "constraints.txt").read_text().splitlines() if s[:1] not in ("#", "")
    ]
    assert pins[0].startswith("torch==")
    loose = [
        p for p in pins if not re.fullmatch(r'[\w.-]+==[\w.]+(; python_version >= "3\.\d+")?', p)
    ]
    assert not loose
