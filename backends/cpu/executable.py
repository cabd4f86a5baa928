"""A compiled plan, and a plan with its weights: binds once, runs from any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effc.ir import Input, InputError, Number, bind_symbols, interpret
from effc.ir.interpret import run_node

from ..base import Bound, Executable, weight_values
from .frame import Frame
from .memory import aligned, assign
from .plan import Plan, Program
from .sizes import has_symbols

KEPT = 16  # idle frames; each holds an arena


class CpuExecutable(Executable):
    """Plan and kernels, built; no weights yet."""

    def __init__(self, plan: Plan, program: Program | None, graph: Any) -> None:
        self.plan, self.program, self.graph = plan, program, graph
        plan.numbered  # noqa: B018  numbers the roots
        self.launches = plan.launches
        self.kernels = {k.name: k.source for k in plan.kernels.values()}
        self.memory = _arena_bytes(plan)

    def bind(self, weights: Mapping[str, torch.Tensor] | None = None) -> Bound:
        if self.program is None:
            raise RuntimeError("this plan was made without building its kernels")
        return CpuBound(self.program, weights)


def _arena_bytes(plan: Plan) -> int | None:
    ours = [r for r in plan.roots if r.kind == "arena"]
    if has_symbols([r.nbytes for r in ours]):
        return None
    sizes = [aligned(r.nbytes) for r in ours]  # type: ignore[arg-type]
    return assign(sizes, [(r.first, r.last) for r in ours])[1]


class CpuBound(Bound):
    """A plan with its weights."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor] | None) -> None:
        self.program, self.plan = program, program.plan
        graph = self.plan.graph
        self.constants = _constants(self.plan, weights)
        self.packed = {p.slot: p.make(self.constants[p.source]) for p in self.plan.packed}
        self._weights = dict(weights or {})
        self._tensors = [isinstance(i.of, Number) is False for i in graph.inputs]
        self._dtypes = [None if isinstance(i.of, Number) else i.of.dtype.torch for i in graph.inputs]
        self._all_tensors = all(self._tensors)
        self._idle: OrderedDict[Any, list[Frame]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        try:
            if self._all_tensors:
                key: Any = tuple([x.shape for x in inputs])
            else:
                key = tuple([x.shape if t else x for x, t in zip(inputs, self._tensors)])
        except AttributeError:
            key = None  # not a tensor: bind_symbols says which
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            frame = self._take(key, inputs)
            try:
                outputs = frame.run(inputs)
            finally:
                self._give(key, frame)
            return self._apart(outputs, inputs) if self.plan.shared else outputs
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    # -------------------------------------------------------------- frames

    def _take(self, key: Any, inputs: Sequence[Any]) -> Any:
        for x, dtype in zip(inputs, self._dtypes):
            if dtype is not None and (key is None or x.dtype is not dtype or not x.is_cpu):
                self._refuse(inputs)
        idle = self._idle.get(key)
        if idle:
            try:
                frame = idle.pop()
            except IndexError:  # another thread took it
                return self._make(inputs)
            self._count -= 1
            return frame
        return self._make(inputs)

    def _refuse(self, inputs: Sequence[Any]) -> None:
        bind_symbols(self.plan.graph, inputs)  # says what does not fit
        for node, x in zip(self.plan.graph.inputs, inputs):
            if isinstance(x, torch.Tensor) and not x.is_cpu:
                raise InputError(f"input {node.key} is on {x.device}, the plan runs on the CPU")

    def _make(self, inputs: Sequence[Any]) -> Any:
        env = bind_symbols(self.plan.graph, inputs)
        if self.plan.equal:
            from .sizes import Numbers

            numbers = Numbers(self.plan.sizes, env)
            if any(numbers(a) != numbers(b) for a, b in self.plan.equal):
                return _Interpreted(self)
        return Frame(self.program, self.constants, self.packed, env)

    def _give(self, key: Any, frame: Any) -> None:
        with self._lock:
            self._idle.setdefault(key, []).append(frame)
            self._idle.move_to_end(key)
            self._count += 1
            while self._count > KEPT:
                oldest = next(iter(self._idle))
                if self._idle[oldest]:
                    self._idle[oldest].pop()
                    self._count -= 1
                if not self._idle[oldest]:
                    del self._idle[oldest]

    # -------------------------------------------------------------- memory of outputs

    def _apart(self, outputs: tuple[Any, ...], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Clone what a fallback gave that shares memory with something it should not."""
        taken = {_storage(x) for x in (*inputs, *self.constants.values())}
        result = list(outputs)
        for i in self.plan.shared:
            others = {_storage(o) for j, o in enumerate(result) if j != i}
            if _storage(result[i]) in taken | others:
                result[i] = result[i].clone()
        return tuple(result)


def _storage(value: Any) -> Any:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else id(value)


def _constants(plan: Plan, weights: Mapping[str, torch.Tensor] | None) -> dict[Any, torch.Tensor]:
    """Evaluate what does not depend on inputs, as far as the plan reads it."""
    graph = plan.graph
    values: dict[Any, Any] = dict(weight_values(graph, weights))
    needed, stack = set(), list(plan.constants)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.operands
    with torch.no_grad():
        for node in graph.nodes:
            if node in needed and node not in values:
                values[node] = run_node(node, values, {})
    return {root: values[node] for node, root in plan.constants.items()}


class _Interpreted:
    """For sizes that the plan's strides do not allow, such as a symbolic size that broadcasts."""

    def __init__(self, bound: CpuBound) -> None:
        graph = bound.plan.graph
        new = weight_values(graph, bound._weights)
        self.graph = graph.substitute({w: type(w).holding(w.key, t, w.of) for w, t in new.items()})

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return interpret(self.graph, inputs)


__all__ = ["CpuBound", "CpuExecutable", "Input"]
