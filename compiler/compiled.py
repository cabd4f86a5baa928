"""A compiled graph as something to call: its arguments, its weights, and what it writes back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch

from effc.aliasing import overlapping
from effc.calling import Calling, Source, Viewed
from effc.ir import Graph, bind_symbols, evaluate
from effc.ir.symbols import symbolic
from effc.record import Record

__all__ = ["CompiledGraph", "LiveWeights"]

# Weight sets whose folded and packed constants are kept at once. More than one is needed where one
# code object serves several module instances (regional compilation of repeated layers).
KEPT_WEIGHT_SETS = 64


class CompiledGraph:
    """Callable on the runtime arguments of the captured graph, in Dynamo's order.

    graph: its inputs say which sizes a call has. original: runs a call as PyTorch would, where the
    graph cannot take it.

    Weights are looked at on every call: a parameter that was replaced or changed in place since
    they were folded and packed makes the next call fold and pack again. (A write through
    `tensor.data` does not move torch's version counter and cannot be seen; call `refresh()`.)
    """

    def __init__(
        self, calling: Calling, graph: Graph, record: Record, original: Callable[..., Any]
    ) -> None:
        self.calling, self.graph, self.record = calling, graph, record
        self._effc_record = record
        self._original = original
        self._bind = LiveWeights(calling.weights, record.executable.bind)
        # unpacked here, because every call goes through them
        self._inputs: list[tuple[int | None, Any]] = [
            (i.position, i.tensor) for i in calling.inputs
        ]
        self._copies: list[tuple[int | None, Any, Any]] = [
            (s.position, s.tensor, result) for s, result in calling.copies
        ]
        self._results = calling.results
        symbols = any(_symbolic(r) or _symbolic(s) for r, s in self._results)
        self._needs_sizes = symbols or any(_symbolic(r) for _, _, r in self._copies)

    def __call__(self, *arguments: Any) -> list[Any]:
        if self._copies and self._overlap(arguments):
            return list(self._original(*arguments))
        if torch.is_autocast_enabled("cpu"):  # its casts are nodes of the graph already
            with torch.autocast("cpu", enabled=False):
                return self(*arguments)
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            return self._run(arguments)
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    def _run(self, arguments: Sequence[Any]) -> list[Any]:
        inputs = [owned if at is None else arguments[at] for at, owned in self._inputs]
        outputs = self._bind(arguments)(inputs)
        env = bind_symbols(self.graph, inputs) if self._needs_sizes else None
        if self._copies:
            outputs = self._write_back(arguments, outputs, env)
        results = []
        for result, strides in self._results:
            if isinstance(result, Viewed):
                value = result.of(arguments)
            else:
                value = _result(result, outputs, env)
            results.append(value if strides is None else _restride(value, strides, env))
        return results

    def _write_back(self, arguments: Sequence[Any], outputs: Sequence[Any], env: Any) -> list[Any]:
        """Copy results into the arguments that the model writes; results keep their values."""
        targets = [owned if at is None else arguments[at] for at, owned, _ in self._copies]
        written = {t.untyped_storage().data_ptr() for t in targets}
        kept = [
            v.clone()
            if isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() in written
            else v
            for v in outputs
        ]
        for target, (_, _, result) in zip(targets, self._copies):
            target.copy_(_result(result, kept, env))
        return kept

    def _overlap(self, arguments: Sequence[Any]) -> bool:
        tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        positions = {at for at, _, _ in self._copies}
        written = [n for n, (i, _) in enumerate(tensors) if i in positions]
        return overlapping([a for _, a in tensors], written)

    def refresh(self) -> None:
        """Forget folded and packed weights; the next call makes them anew."""
        self._bind.refresh()


class LiveWeights:
    """What `bind` makes of the weights that a call finds, by name; again where one was changed.

    Looked at on every call, so a parameter that was replaced or written in place is noticed.
    """

    def __init__(self, weights: Iterable[Source], bind: Callable[[dict[str, Any]], Any]) -> None:
        self._bind = bind
        self._weights: list[tuple[str, int | None, Any]] = [
            (w.name, w.position, w.tensor) for w in weights
        ]
        owned = [t for _, at, t in self._weights if at is None]
        self._owned = owned if len(owned) == len(self._weights) else None
        self._counted = self._owned is not None and not any(t.is_inference() for t in owned)
        self._bound: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._last: tuple[tuple[Any, ...], Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, arguments: Sequence[Any] = ()) -> Any:
        tensors = self._owned
        if tensors is None:
            tensors = [owned if at is None else arguments[at] for _, at, owned in self._weights]
        # two maps over functions of C: a decoder asks this for every token
        places = tuple(map(_place, tensors))
        key = places, tuple(map(_version, tensors) if self._counted else map(_version_of, tensors))
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        with self._lock:
            bound = self._bound.get(key)
            if bound is None:
                for old in [k for k in self._bound if places and k[0] == places]:
                    del self._bound[old]  # the same memory with older contents
                bound = self._bind({name: t for (name, _, _), t in zip(self._weights, tensors)})
                self._bound[key] = bound
                while len(self._bound) > KEPT_WEIGHT_SETS:
                    self._bound.popitem(last=False)
            else:
                self._bound.move_to_end(key)
            self._last = (key, bound)
        return bound

    def refresh(self) -> None:
        with self._lock:
            self._bound.clear()
            self._last = None


_place, _version = torch.Tensor.data_ptr, attrgetter("_version")


def _version_of(t: torch.Tensor) -> int:
    # inference tensors carry no version counter; they cannot be written outside inference mode
    return -1 if t.is_inference() else t._version


def _symbolic(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_symbolic, value))
    return symbolic(value)


def _result(result: Any, outputs: Sequence[Any], env: Any) -> Any:
    if isinstance(result, tuple) and result[:1] == ("node",):
        return outputs[result[1]]
    return evaluate(result, env) if symbolic(result) else result


def _restride(value: torch.Tensor, strides: tuple[Any, ...], env: Any) -> torch.Tensor:
    """The value with eager's strides: code after it (`.view`, ...) finds what it expects."""
    want: Any = evaluate(strides, env) if env is not None else strides
    if value.stride() == want or value.numel() < 2:
        return value
    if all(a == b for a, b, n in zip(value.stride(), want, value.shape) if n != 1):
        return value
    made = torch.empty_strided(value.shape, want, dtype=value.dtype, device=value.device)
    return made.copy_(value)
