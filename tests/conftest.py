"""What every test gets: golden text, real data, fixed seeds, and a cache of its own."""

from __future__ import annotations

import difflib
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
SHARED_DATA = TESTS.parent.parent / "shared" / "data"

# On CI every run tries the same examples; elsewhere each run tries new ones.
hypothesis.settings.register_profile(
    "effc", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("effc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden from what the tests see now",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # Workers share the cores: one thread each, and in what tests start. Before torch loads.
        os.environ["OMP_NUM_THREADS"] = "1"
        return
    # Kernels are built once per run, for all workers, and never taken from an earlier run.
    config.stash[_CACHE] = tempfile.mkdtemp(prefix="effc-test-cache-")
    os.environ["EFFC_CACHE_DIR"] = config.stash[_CACHE]
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


_CACHE = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False here")
        for item in marked:
            item.add_marker(skip)


# ------------------------------------------------------------------ golden text


class Golden:
    """Expected text, kept in a file: `assert text == golden`, or `== golden("after")` for more."""

    def __init__(self, path: Path, update: bool) -> None:
        self.path, self.update = path, update

    def __call__(self, part: str) -> Golden:
        return Golden(self.path.with_name(f"{self.path.stem}.{part}.txt"), self.update)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(other.rstrip("\n") + "\n")
            return True
        if not self.path.exists():
            pytest.fail(
                f"no golden text {self.path.relative_to(TESTS.parent)}: "
                "run this test with --update-golden and read the file it writes",
            )
        return self.text == other.rstrip("\n")

    __hash__ = None

    @property
    def text(self) -> str:
        return self.path.read_text().rstrip("\n")

    def __repr__(self) -> str:
        return f"<golden {self.path.relative_to(GOLDEN)}>"

    def diff(self, text: str) -> list[str]:
        name = str(self.path.relative_to(TESTS.parent))
        lines = difflib.unified_diff(
            self.text.splitlines(), text.rstrip("\n").splitlines(), name, "this run", lineterm=""
        )
        return [*lines, "", "if the new text is right: --update-golden"]


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    if op != "==":
        return None
    for golden, text in ((left, right), (right, left)):
        if isinstance(golden, Golden) and isinstance(text, str):
            return [f"text differs from {golden!r}", *golden.diff(text)]
    return None


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The text kept in tests/golden/<test file>/<test name>.txt; `--update-golden` rewrites it."""
    test = request.node
    file = test.path.relative_to(TESTS).with_suffix("")
    names = [test.cls.__name__] if test.cls else []
    name = re.sub(r"[^\w.=-]+", "_", ".".join([*names, test.name])).strip("_")
    return Golden(GOLDEN / file / f"{name}.txt", request.config.getoption("update_golden"))


# ------------------------------------------------------------------ real data, clean state


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and test data, a folder beside the repository. Skips where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data beside the repository (real models and test data)")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Same random numbers in every test; nothing that torch compiled or was set to stays behind."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is None:
        yield
    else:
        torch.manual_seed(0)
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        yield
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
