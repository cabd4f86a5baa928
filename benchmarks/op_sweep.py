"""torch's own operator database through `torch.compile(op, backend="effc")`, against eager.

    effc bench ops [--rounds 3] [--only NAME] ...     rounds: samples of each operator

For every operator and CPU float32 sample: the same seed, one eager call, one compiled call, and
torch.testing's own tolerances. Operators whose result is random by design are compared by the seed
too; those that torch leaves uninitialised (`empty`) by type and shape only.
"""

from __future__ import annotations

import json
import logging
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from click import echo

# Their memory is not written by the operator: only type, shape and strides mean something.
UNINITIALISED = (
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
)  # fmt: skip


@dataclass
class Result:
    """One operator: how many samples agree with eager, what went to ATen, what failed."""

    op: str
    samples: int = 0
    right: int = 0
    refused: str = ""  # why whole graphs were not taken
    failure: str = ""
    skipped: str = ""


def operators(names: Iterable[str] = ()) -> list[Any]:
    """Entries of torch's operator database; all of them, or those of the given names."""
    from torch.testing._internal.common_methods_invocations import op_db

    wanted = set(names)
    return [o for o in op_db if not wanted or o.name in wanted or o.formatted_name in wanted]


def sweep(ops: Iterable[Any], samples: int, backend: str = "effc") -> Iterator[Result]:
    """Compare each operator on its first `samples` CPU float32 samples."""
    for o in ops:
        result = Result(o.formatted_name)
        if torch.float32 not in o.dtypes:
            result.skipped = "no float32 on CPU"
        else:
            _check(o, samples, backend, result)
        yield result


def _check(o: Any, samples: int, backend: str, result: Result) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        return o.op(*args, **kwargs)

    drawn = islice(o.sample_inputs("cpu", torch.float32, requires_grad=False), samples)
    for sample in drawn:
        args = (sample.input, *sample.args)
        try:
            with torch.no_grad():
                want = _seeded(call, args, sample.kwargs)
        except Exception as e:  # CUDA-only operators, samples that this build of torch refuses
            result.skipped = f"eager raises {type(e).__name__}: {' '.join(str(e).split())[:120]}"
            return
        result.samples += 1
        torch._dynamo.reset()
        compiled = torch.compile(call, backend=backend)
        try:
            with torch.no_grad():
                got = _seeded(compiled, args, sample.kwargs)
            _compare(o, got, want)
            result.right += 1
        except Exception as e:  # a sweep reports every kind of failure
            result.failure = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        result.refused = result.refused or _refusal(compiled)


def _seeded(fn: Any, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.clone() if t.layout is torch.strided else t, (args, kwargs)
    )
    return fn(*args, **kwargs)


def _compare(o: Any, got: Any, want: Any) -> None:
    if o.name in UNINITIALISED:
        got, want = (torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.zeros_like, v) for v in (got, want))  # fmt: skip
    torch.testing.assert_close(got, want, equal_nan=True, check_stride=False)


def _refusal(compiled: Any) -> str:
    from effc.explanation import explain
    from effc.ir import EffcError

    try:
        records = explain(compiled).records
    except EffcError:
        return ""
    return next((str(r.refusal) for r in records if r.refusal is not None), "")


def run(names: Sequence[str], samples: int, out: Path | None = None) -> Counter[str]:
    """Sweep operators by name (all without names), print failures and counts, write `out`."""
    start = time.perf_counter()
    results, count = [], Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            for result in sweep(operators(names), samples):
                results.append(result)
                if result.failure:
                    echo(f"{result.op}: {result.failure}")
        finally:
            logging.disable(before)
    for r in results:
        count["skipped" if r.skipped else "failed" if r.failure else "right"] += 1
        count["samples"] += r.samples
        count["refused whole"] += bool(r.refused)
    echo(f"{dict(count)} {time.perf_counter() - start:.0f} s")
    if out:
        found = {
            "date": date.today().isoformat(), "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__, "samples": samples, "counts": dict(count),
            "operators": [asdict(r) for r in results],
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    return count
