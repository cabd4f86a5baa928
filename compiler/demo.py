"""`effc demo`: a photograph enlarged 4x by RLFN through eager PyTorch, Inductor and effc, compared.

Writes the picture (bicubic, RLFN, original), the enlarged photograph, the report of the
compilation and its dump.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from effc.examples.rlfn import RLFN, load_rlfn, super_resolve
from effc.examples.rlfn.images import (
    DEMO,
    downscale,
    load_image,
    save_image,
    to_8bit,
    upscale,
    y_psnr,
)  # fmt: skip
from effc.explanation import explain

ROUNDS = 9  # timed calls of each, interleaved; the median counts
WEIGHTS = Path(__file__).parent.parent / "examples" / "rlfn" / "weights"


@dataclass
class Row:
    """One way of running the network."""

    name: str
    first_call: float = 0.0  # seconds, compilation included
    seconds: float = 0.0  # median of a call
    psnr: float | None = None  # dB of the luma against the original
    difference: float = 0.0  # largest against eager, in grey levels of 0..255
    failed: str = ""


def main(image: str | None = None, weights: str | None = None, out: str = "out") -> int:
    """Run the demo and print its table.

    image: a photograph to enlarge (default: one that the network never saw, shrunk 4x first, so
    that there is an original to compare with). weights: .safetensors or .pth of RLFN x4.
    """
    console = Console()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    net = load_rlfn(weights or _weights()).eval()
    original: Tensor | None = None
    if image:
        small = load_image(image)
    else:
        original = DEMO.load()
        small = downscale(original)
    title = f"{image or DEMO.name}: {small.shape[-1]} x {small.shape[-2]}, enlarged 4 times"
    console.print(
        f"[bold]{title}[/], {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"{torch.get_num_threads()} threads"
    )
    ways = _ways(net, folder / "dump")
    rows, result = _compare(ways, small, original, console)
    console.print(_table(rows))
    save_image(to_8bit(result), folder / "enlarged.png")
    _picture(small, result, original, folder / "before_after.png")
    explanation = explain(ways["effc"])
    (folder / "report.txt").write_text(str(explanation), encoding="utf-8")
    (folder / "report.json").write_text(explanation.json(), encoding="utf-8")
    (folder / "demo.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    for name in ("before_after.png", "enlarged.png", "report.txt", "dump"):
        console.print(f"  {folder / name}")
    return 0


def _weights() -> Path:
    return WEIGHTS / "rlfn_x4_photos.safetensors"


def _ways(net: RLFN, dump: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    return {
        "eager": net,
        "Inductor": torch.compile(net),
        "effc": torch.compile(net, backend="effc", options={"dump": str(dump)}),
    }


def _compare(
    ways: dict[str, Callable[[Tensor], Tensor]],
    small: Tensor,
    original: Tensor | None,
    console: Console,
) -> tuple[list[Row], Tensor]:
    rows = [Row(name) for name in ways]
    images: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling and running", total=len(rows) * (ROUNDS + 1))
        for row in rows:
            start = time.perf_counter()
            try:
                images[row.name] = super_resolve(ways[row.name], small)
            except torch._dynamo.exc.BackendCompilerFailed as e:
                if row.name != "Inductor":  # a machine without a C++ compiler still sees the demo
                    raise
                row.failed = str(e).strip().splitlines()[0]
            row.first_call = time.perf_counter() - start
            progress.advance(task)
        for _ in range(ROUNDS):
            for row in rows:
                if not row.failed:
                    start = time.perf_counter()
                    super_resolve(ways[row.name], small)
                    times[row.name].append(time.perf_counter() - start)
                progress.advance(task)
    for row in rows:
        if not row.failed:
            row.seconds = statistics.median(times[row.name])
            row.difference = (images[row.name] - images["eager"]).abs().max().item()
            row.psnr = None if original is None else y_psnr(images[row.name], original)
    if original is not None:
        rows.insert(0, Row("bicubic", psnr=y_psnr(upscale(small), original)))
    return rows, images["effc"]


def _table(rows: list[Row]) -> Table:
    table = Table("", "first call", "each call", "against eager", "PSNR", "difference to eager")
    for column in table.columns[1:]:
        column.justify = "right"
    eager = next(r for r in rows if r.name == "eager").seconds
    for r in rows:
        if r.failed:
            table.add_row(r.name, r.failed, "", "", "", "")
            continue
        timed = bool(r.seconds)
        table.add_row(
            r.name, f"{r.first_call:.2f} s" if timed else "",
            f"{r.seconds * 1e3:.1f} ms" if timed else "",
            f"{eager / r.seconds:.2f}x" if timed else "",
            "" if r.psnr is None else f"{r.psnr:.2f} dB",
            f"{r.difference:.1e}" if timed and r.name != "eager" else "",
        )  # fmt: skip
    return table


def _picture(small: Tensor, result: Tensor, original: Tensor | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("bicubic", upscale(small)), ("RLFN through effc", to_8bit(result))]
    if original is not None:
        panels.append(("original", original))
    height, width = result.shape[-2:]
    crop = min(height, width, 256)
    top, left = (height - crop) // 4, (width - crop) // 2
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4.3))
    for axis, (title, shown) in zip(axes, panels):
        axis.imshow(shown[0, :, top : top + crop, left : left + crop].permute(1, 2, 0).byte())
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
