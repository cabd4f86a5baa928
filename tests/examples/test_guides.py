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


@pytest.mark.parametrize("name", GUIDES)
def test_guide_runs(name):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert GUIDES[name] in done.stdout


def test_every_guide_is_run():
    scripts = {p.name for p in (ROOT / "examples").glob("*.py")} - {"__init__.py"}
    assert scripts == set(GUIDES) | STUDIES
    assert all((ROOT / "tests/examples" / f"test_{name}").exists() for name in STUDIES)
