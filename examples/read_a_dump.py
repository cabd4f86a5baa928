"""Read a dump: every stage of a compilation as a file that runs on its own.

python examples/read_a_dump.py [FOLDER]

FOLDER/000_capture.py       the model as captured; `python 000_capture.py` runs it
FOLDER/001_<pass>.py ...    after each pass, headed by what it did
FOLDER/kernels/             the source of every generated kernel
FOLDER/report.json          the report for programs;  index.html for people
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
    ).eval()
    compiled = torch.compile(model, backend="effc", options={"dump": str(folder)})
    with torch.no_grad():
        compiled(torch.randn(1, 3, 32, 32))
    stages = sorted(folder.rglob("0*.py"))
    for stage in stages:
        print(f"{stage.name}: {stage.read_text().splitlines()[0]}")
    print(stages[-1].read_text())
    print("running it:")
    subprocess.run([sys.executable, stages[-1]], check=True)
    report = json.loads(next(folder.rglob("report.json")).read_text())
    print("report.json has:", ", ".join(report))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "dump")
