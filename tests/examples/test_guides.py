"""The guides run as a reader would run them, and print what they are about."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = {
    "write_a_rule.py": "because the factor -3.0 is negative",
    "write_a_pass.py": "clip-activations{limit=1.0}: 1 rewrites",
    "add_an_op.py": "squared_relu",
    "write_a_gpu_kernel.py": "largest difference from eager",
    "read_a_dump.py": "report.json has:",
}
# Minutes to an hour with a real model; tests/examples/test_NAME.py has what is quick of them.
STUDIES = {"fold_smollm2.py"}


# Imports once what takes seconds; each guide runs in a fork of it, with nothing of another's.
RUNNER = """
import os, runpy, sys
import torch._dynamo, effc
folder, *guides = sys.argv[1:]
for path in guides:
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(os.path.basename(path), code, flush=True)
        continue
    for number, kind in ((1, "out"), (2, "err")):
        opened = os.open(f"{folder}/{os.path.basename(path)}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
    sys.argv, sys.path[0] = [path], os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")
    sys.exit()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Name -> exit code, what it printed, what it said on stderr."""
    folder = tmp_path_factory.mktemp("guides")
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, folder, *(ROOT / "examples" / name for name in GUIDES)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = dict(line.split() for line in done.stdout.splitlines())
    said = {n: [(folder / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in codes}
    return {name: (int(code), *said[name]) for name, code in codes.items()}


@pytest.mark.parametrize("name", GUIDES)
def test_guide_runs(name, ran):
    code, printed, said = ran[name]
    assert code == 0, said
    assert GUIDES[name] in printed


def test_every_guide_is_run():
    scripts = {p.name for p in (ROOT / "examples").glob("*.py")} - {"__init__.py"}
    assert scripts == set(GUIDES) | STUDIES
    assert all((ROOT / "tests/examples" / f"test_{name}").exists() for name in STUDIES)
