"""Train a small RLFN on the photographs that come with Python packages.

The paper's recipe: stages of equal length; each starts from the previous stage's weights and runs
the same learning-rate schedule again (warm start).  The loss is L1; the last stages add a
contrastive loss on the features of a random conv3x3-Tanh-conv3x3.  The schedule follows the clock,
so it completes within `--minutes` however busy the machine is.

    python -m examples.rlfn.train --minutes 100 --threads 1
    python -m examples.rlfn.train --resume                    # continue after Ctrl-C
    python -m examples.rlfn.train --export                    # weights from the last checkpoint
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import (
    HELD_OUT,
    TRAINING,
    downscale,
    load_image,
    modcrop,
    resize_bicubic,
    to_8bit,
    upscale,
    y_psnr,
)
from .model import RLFN, count_parameters

WEIGHTS = Path(__file__).parent / "weights" / "rlfn_x4_photos.safetensors"
"""Where the trained weights go; the results lie beside them as .json."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the clock.

    patch: low-resolution crop in pixels. shrink: sizes at which each photograph is used as truth.
    contrastive_stages: how many of the last stages add the contrastive loss.
    """

    channels: int = 40
    mid_channels: int = 40
    blocks: int = 4
    upscale: int = 4
    stages: int = 3
    contrastive_stages: int = 1
    contrastive_weight: float = 0.2
    batch: int = 8
    patch: int = 32
    lr: float = 1e-3
    lr_end: float = 1e-6
    warmup: float = 0.02
    ema: float = 0.999
    shrink: tuple[float, ...] = (1.0, 0.8, 0.6, 0.45)
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """How long to train: wall-clock seconds, or a number of steps where that is given."""

    seconds: float = 6000.0
    steps: int | None = None

    def progress(self, elapsed: float, step: int) -> float:
        """The part done, 0..1."""
        done = elapsed / self.seconds if self.steps is None else step / self.steps
        return min(done, 1.0)


@dataclass
class Example:
    """One truth image with its low-resolution image and that one's bicubic enlargement, uint8."""

    name: str
    high: Tensor  # [3, 4h, 4w]
    low: Tensor  # [3, h, w]
    bicubic: Tensor  # [3, 4h, 4w]
    detail: float = 1.0


class Crops:
    """Random aligned crops, flipped, turned and with permuted colours."""

    def __init__(self, examples: Sequence[Example], patch: int, factor: int) -> None:
        self.examples = [e for e in examples if min(e.low.shape[-2:]) >= patch]
        if not self.examples:
            raise ValueError(f"no training image is {patch}x{patch} pixels or more when shrunk")
        self.patch, self.factor = patch, factor
        # Large pictures hold more different crops, but no single one may dominate.
        self.weights = [math.sqrt(e.low[0].numel()) * e.detail for e in self.examples]

    def batch(self, n: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """n crops: low [n,3,p,p], high and bicubic [n,3,4p,4p], float32 in 0..1."""
        rows = [self._crop(rng) for _ in range(n)]
        low, high, bicubic = (torch.stack(part).float() / 255 for part in zip(*rows, strict=True))
        layout = torch.channels_last
        return tuple(t.contiguous(memory_format=layout) for t in (low, high, bicubic))

    def _crop(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        e = rng.choices(self.examples, self.weights)[0]
        p, s = self.patch, self.factor
        y = rng.randrange(e.low.shape[1] - p + 1)
        x = rng.randrange(e.low.shape[2] - p + 1)
        turns, mirror = rng.randrange(4), rng.random() < 0.5
        colours = rng.sample(range(3), 3) if rng.random() < 0.5 else [0, 1, 2]

        def cut(image: Tensor, k: int) -> Tensor:
            part = image[colours, y * k : (y + p) * k, x * k : (x + p) * k]
            part = torch.rot90(part, turns, (1, 2))
            return part.flip(2) if mirror else part

        return cut(e.low, 1), cut(e.high, s), cut(e.bicubic, s)


def training_examples(shrink: Sequence[float], factor: int = 4) -> list[Example]:
    """The training photographs, each also at the smaller sizes, with their LR images."""
    return [
        example
        for photo in TRAINING
        for example in examples_of(photo.name, photo.load(), shrink, factor, photo.detail)
    ]


def examples_of(
    name: str, image: Tensor, shrink: Sequence[float], factor: int = 4, detail: float = 1.0
) -> list[Example]:
    """`image` [1, 3, H, W] as truth at each relative size of `shrink`."""
    found = []
    for scale in shrink:
        h, w = (int(n * scale) // factor * factor for n in image.shape[-2:])
        high = modcrop(image, factor) if scale == 1 else to_8bit(resize_bicubic(image, (h, w)))
        low = downscale(high, factor)
        parts = (t[0].byte() for t in (high, low, upscale(low, factor)))
        found.append(Example(f"{name}@{scale:g}", *parts, detail=detail))
    return found


class ContrastiveLoss(nn.Module):
    """|phi(SR) - phi(HR)| / |phi(SR) - phi(bicubic)| for a random, fixed, shallow phi."""

    def __init__(self, channels: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.phi = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        rng = torch.Generator().manual_seed(seed)
        for p in self.phi.parameters():
            p.requires_grad_(False)
            if p.dim() == 4:  # keeps tanh busy for images in 0..1
                p.copy_(torch.randn(p.shape, generator=rng) * (2 / p[0].numel() ** 0.5))
            else:
                p.zero_()

    def forward(self, sr: Tensor, hr: Tensor, bicubic: Tensor) -> Tensor:
        """Three images [B, 3, H, W] in 0..1 -> scalar; smaller is nearer to the truth."""
        f = self.phi(sr)
        with torch.no_grad():
            near, far = self.phi(hr), self.phi(bicubic)
        return (f - near).abs().mean() / ((f - far).abs().mean() + 1e-4)


def new_network(recipe: Recipe) -> RLFN:
    """A network for images in 0..1 that starts as nearest-neighbour enlargement plus small noise.

    Only initial values: channels 0..2 of the trunk carry RGB to the upsampler.  Saves the first
    minutes, in which a network without a global skip would learn to copy.
    """
    torch.manual_seed(recipe.seed)
    r = recipe
    net = RLFN(r.channels, r.mid_channels, r.blocks, r.upscale)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() != 4:
                p.zero_()
            elif name.endswith(("c1_r.weight", "c2_r.weight", "c3_r.weight")):
                nn.init.kaiming_normal_(p, a=0.05)
                if "c3_r" in name:
                    p.mul_(0.3)
        for i in range(1, r.blocks + 1):
            c5 = net.get_submodule(f"block_{i}.c5").weight
            c5.mul_(0.1).add_(2 * torch.eye(r.channels)[:, :, None, None])  # the gate halves it
        net.conv_2.weight.mul_(0.5)
        rgb, centre = torch.arange(3), 1
        net.conv_1.weight[:3] = 0
        net.conv_1.weight[rgb, rgb, centre, centre] = 1.0
        net.conv_2.weight[:3] = 0
        up, squares = net.upsampler[0].weight, r.upscale**2
        up.mul_(0.1)
        up[:, :3] = 0
        for c in range(3):
            up[c * squares : (c + 1) * squares, c, centre, centre] = 1.0
    return net.to(memory_format=torch.channels_last)


def fold_range(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for images in 0..1 as weights for 0..255: f255(x) = 255 * f01(x / 255)."""
    folded = {k: v.detach().clone().contiguous() for k, v in state.items()}
    folded["conv_1.weight"] /= 255
    folded["upsampler.0.weight"] *= 255
    folded["upsampler.0.bias"] *= 255
    return folded


def learning_rate(stage_progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr_end`; the same in every stage."""
    if stage_progress < recipe.warmup:
        return recipe.lr * max(stage_progress / recipe.warmup, 0.02)
    t = (stage_progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.lr_end + (recipe.lr - recipe.lr_end) * 0.5 * (1 + math.cos(math.pi * t))


@dataclass
class Scores:
    """Mean luma PSNR in dB over photographs, and per photograph."""

    net: float
    bicubic: float
    photos: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """dB over bicubic."""
        return self.net - self.bicubic


def evaluate(net: nn.Module, factor: int = 4) -> Scores:
    """Enlarge the held-out photographs with `net` (0..255) and with bicubic from the same LR."""
    photos = {}
    for photo in HELD_OUT:
        high = photo.load()
        low = downscale(high, factor)
        with torch.inference_mode():
            ours = y_psnr(net(low), high, factor)
        photos[photo.name] = {
            "bicubic": round(y_psnr(upscale(low, factor), high, factor), 3),
            "rlfn": round(ours, 3),
        }
    mean = {k: sum(p[k] for p in photos.values()) / len(photos) for k in ("rlfn", "bicubic")}
    return Scores(mean["rlfn"], mean["bicubic"], photos)


class Trainer:
    """The training state: network, average, optimiser, stage, random numbers; save and resume."""

    def __init__(
        self, recipe: Recipe, budget: Budget, examples: Sequence[Example], bf16: bool = False
    ) -> None:
        self.recipe, self.budget, self.bf16 = recipe, budget, bf16
        self.crops = Crops(examples, recipe.patch, recipe.upscale)
        self.rng = random.Random(recipe.seed)
        self.contrastive = ContrastiveLoss(seed=recipe.seed)
        self.net = new_network(recipe)
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.step, self.elapsed, self.stage = 0, 0.0, 0
        self.stage_step = 0
        self._new_optimiser()

    @property
    def progress(self) -> float:
        """The part of the budget used, 0..1."""
        return self.budget.progress(self.elapsed, self.step)

    def train_step(self) -> float:
        """One update; the L1 loss in grey levels.  Enters the next stage where that is due."""
        stage_progress = self._enter_stage()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(stage_progress, self.recipe)
        low, high, bicubic = self.crops.batch(self.recipe.batch, self.rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            sr = self.net(low)
        sr = sr.float()
        l1 = 255 * F.l1_loss(sr, high)
        loss = l1
        if self.recipe.contrastive_weight and self._is_contrastive():
            loss = l1 + self.recipe.contrastive_weight * self.contrastive(sr, high, bicubic)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 100.0)
        self.optimiser.step()
        self.step += 1
        self.stage_step += 1
        self._average()
        return l1.item()

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, for images in 0..255."""
        return fold_range(self.average.state_dict())

    def network(self) -> RLFN:
        """The averaged network, for images in 0..255."""
        net = copy.deepcopy(self.average)
        net.load_state_dict(self.weights())
        return net.to(memory_format=torch.channels_last).eval()

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the previous one."""
        state = {
            "recipe": asdict(self.recipe),
            "budget": asdict(self.budget),
            "bf16": self.bf16,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "elapsed": self.elapsed,
            "rng": json.dumps(self.rng.getstate()),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    @classmethod
    def resume(cls, path: Path, examples: Sequence[Example], **changes: object) -> Trainer:
        """Continue from a checkpoint; `changes` replaces the budget or bf16."""
        state = read_checkpoint(path)
        options = {"budget": Budget(**state["budget"]), "bf16": state["bf16"]} | changes
        trainer = cls(recipe_of(state), examples=examples, **options)
        trainer.net.load_state_dict(state["net"])
        trainer.average.load_state_dict(state["average"])
        trainer.stage, trainer.step = state["stage"], state["step"]
        trainer.stage_step, trainer.elapsed = state["stage_step"], state["elapsed"]
        trainer._new_optimiser()
        trainer.optimiser.load_state_dict(state["optimiser"])
        version, numbers, gauss = json.loads(state["rng"])
        trainer.rng.setstate((version, tuple(numbers), gauss))
        return trainer

    def _enter_stage(self) -> float:
        """Start the stage that the budget says; returns the progress within it, 0..1."""
        position = self.progress * self.recipe.stages
        stage = min(int(position), self.recipe.stages - 1)
        if stage != self.stage:
            # Warm start: the averaged weights go on, the optimiser and its schedule start anew.
            self.stage, self.stage_step = stage, 0
            self.net.load_state_dict(self.average.state_dict())
            self._new_optimiser()
        return position - stage

    def _is_contrastive(self) -> bool:
        return self.stage >= self.recipe.stages - self.recipe.contrastive_stages

    def _new_optimiser(self) -> None:
        self.optimiser = torch.optim.Adam(
            self.net.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), fused=True
        )

    def _average(self) -> None:
        # A young average follows quickly, so that it holds no untrained weights.
        decay = min(self.recipe.ema, (1 + self.stage_step) / (10 + self.stage_step))
        mine = [p for p in self.average.parameters()]
        torch._foreach_lerp_(mine, [p.detach() for p in self.net.parameters()], 1 - decay)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's dictionary, read without running code."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; start without --resume")
    return torch.load(path, map_location="cpu", weights_only=True)


def recipe_of(state: dict) -> Recipe:
    """The recipe stored in a checkpoint."""
    values = dict(state["recipe"])
    values["shrink"] = tuple(values["shrink"])
    return Recipe(**values)


def write_weights(trainer: Trainer, path: Path, finished: bool) -> Scores:
    """Save the averaged weights as float32 safetensors, and the held-out scores beside them."""
    from safetensors.torch import save_file

    net = trainer.network()
    scores = evaluate(net, trainer.recipe.upscale)
    names = [p.name for p in TRAINING]
    metadata = {
        "network": f"RLFN x{net.upscale}, {net.blocks} blocks of {net.channels} channels",
        "range": "RGB, 0..255 in and out",
        "training photographs": ", ".join(names),
        "held-out photographs": ", ".join(scores.photos),
        "steps": str(trainer.step),
        "seed": str(trainer.recipe.seed),
        "finished": "yes" if finished else f"no, {trainer.progress:.0%} of the schedule",
    }
    result = {
        "network": metadata["network"],
        "parameters": count_parameters(net),
        "finished": finished,
        "schedule_done": round(trainer.progress, 4),
        "steps": trainer.step,
        "minutes": round(trainer.elapsed / 60, 1),
        "steps_per_second": round(trainer.step / max(trainer.elapsed, 1e-9), 2),
        "psnr_y": {"rlfn": round(scores.net, 3), "bicubic": round(scores.bicubic, 3)},
        "gain_db": round(scores.gain, 3),
        "held_out": scores.photos,
        "trained_on": names,
        "recipe": asdict(trainer.recipe),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in trainer.weights().items()}, part, metadata)
    part.chmod(0o644)  # safetensors writes files that only their owner reads
    os.replace(part, path)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return scores


def run(
    trainer: Trainer,
    checkpoint: Path,
    weights: Path,
    report_seconds: float = 60.0,
    score_seconds: float = 300.0,
) -> bool:
    """Train to the end of the budget; True when finished, False when interrupted.

    Writes the checkpoint and interim weights on the way.  Ctrl-C and a plain kill finish the
    running step, then save.
    """
    bar = Bar(trainer, report_seconds)
    clock = time.monotonic() - trainer.elapsed
    next_score = trainer.elapsed + min(score_seconds, 60.0)
    with stop_on_signals() as stop:
        while trainer.progress < 1 and not stop:
            bar.update(trainer.train_step())
            trainer.elapsed = time.monotonic() - clock
            if trainer.elapsed >= next_score:
                trainer.save(checkpoint)
                bar.line(describe(write_weights(trainer, weights, finished=False)))
                next_score = trainer.elapsed + score_seconds
    bar.close()
    trainer.save(checkpoint)
    finished = trainer.progress >= 1
    scores = write_weights(trainer, weights, finished)
    print(describe(scores), flush=True)
    if finished:
        print(f"weights: {weights}", flush=True)
    else:
        print(f"stopped at {trainer.progress:.1%}; go on with --resume", flush=True)
    return finished


def describe(scores: Scores) -> str:
    """One line: mean and per-photograph gain over bicubic in dB."""
    each = ", ".join(f"{k} {v['rlfn'] - v['bicubic']:+.2f}" for k, v in scores.photos.items())
    return f"held-out {scores.net:.2f} dB, {scores.gain:+.3f} over bicubic ({each})"


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a termination request arrives; twice is immediate."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Bar:
    """Progress: one live line on a terminal, a plain line now and then in a log."""

    def __init__(self, trainer: Trainer, seconds: float) -> None:
        self.trainer, self.live = trainer, sys.stderr.isatty()
        self.seconds = 1.0 if self.live else seconds
        self.last = time.monotonic()
        self.first_step, self.loss = trainer.step, math.nan
        self.shown = False

    def update(self, loss: float) -> None:
        """Count a step with its L1 loss in grey levels."""
        self.loss = loss if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * loss
        now = time.monotonic()
        if now - self.last < self.seconds:
            return
        t = self.trainer
        rate = (t.step - self.first_step) / (now - self.last)
        self.last, self.first_step = now, t.step
        filled = int(24 * t.progress)
        text = (
            f"[{'#' * filled}{'.' * (24 - filled)}] {t.progress:6.1%} stage {t.stage + 1}/"
            f"{t.recipe.stages} step {t.step} L1 {self.loss:.3f} {rate:.1f} steps/s"
        )
        sys.stderr.write(f"\r{text}\033[K" if self.live else text + "\n")
        sys.stderr.flush()
        self.shown = self.live

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self.shown:
            sys.stderr.write("\n")
            self.shown = False


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AMX or AVX512-BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    d = Recipe()
    p = argparse.ArgumentParser(
        prog="python -m examples.rlfn.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--minutes", type=float, default=100.0, help="wall-clock budget")
    p.add_argument("--steps", type=int, help="budget in steps instead of minutes")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--channels", type=int, default=d.channels)
    p.add_argument("--mid-channels", type=int, help="default: as --channels")
    p.add_argument("--blocks", type=int, default=d.blocks)
    p.add_argument("--stages", type=int, default=d.stages)
    p.add_argument("--contrastive-stages", type=int, default=d.contrastive_stages)
    p.add_argument("--batch", type=int, default=d.batch)
    p.add_argument("--patch", type=int, default=d.patch, help="low-resolution pixels")
    p.add_argument("--lr", type=float, default=d.lr)
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument(
        "--bf16",
        choices=("auto", "on", "off"),
        default="auto",
        help="bfloat16 autocast; auto: where the processor has it",
    )
    p.add_argument(
        "--folder",
        type=Path,
        action="append",
        default=[],
        help="also train on the images in this folder",
    )
    p.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("out/rlfn_checkpoint"),
        help="folder of the checkpoint",
    )
    p.add_argument("--out", type=Path, default=WEIGHTS, help="weights file to write")
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue the checkpoint with its own recipe and budget",
    )
    p.add_argument("--export", action="store_true", help="only write the checkpoint's weights")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; 0 when finished, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    file = args.checkpoint / "last.pt"
    shrink = Recipe().shrink
    if args.export or args.resume:
        shrink = recipe_of(read_checkpoint(file)).shrink
    examples = training_examples(shrink)
    for folder in args.folder:
        examples += folder_examples(folder, shrink)
    if args.export or args.resume:
        trainer = Trainer.resume(file, examples)
        if args.export:
            print(describe(write_weights(trainer, args.out, trainer.progress >= 1)))
            return 0
    else:
        recipe = Recipe(
            channels=args.channels,
            mid_channels=args.mid_channels or args.channels,
            blocks=args.blocks,
            stages=args.stages,
            contrastive_stages=args.contrastive_stages,
            batch=args.batch,
            patch=args.patch,
            lr=args.lr,
            seed=args.seed,
        )
        bf16 = args.bf16 == "on" or (args.bf16 == "auto" and has_fast_bf16())
        trainer = Trainer(recipe, Budget(60 * args.minutes, args.steps), examples, bf16)
    print(
        f"RLFN x4, {trainer.recipe.blocks} blocks of {trainer.recipe.channels} channels, "
        f"{count_parameters(trainer.net):,} parameters; {len(examples)} images, "
        f"{'bf16' if trainer.bf16 else 'fp32'}, {args.threads} thread(s)",
        flush=True,
    )
    return 0 if run(trainer, file, args.out) else 130


def folder_examples(folder: Path, shrink: Sequence[float]) -> list[Example]:
    """Truth images from the PNG and JPEG files of a folder."""
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not files:
        raise FileNotFoundError(f"no .png or .jpg in {folder}")
    return [e for f in files for e in examples_of(f.name, modcrop(load_image(f)), shrink)]


__all__ = ["Budget", "Recipe", "Trainer", "evaluate", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
