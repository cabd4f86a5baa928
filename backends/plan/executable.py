"""A compiled plan, and a plan with its weights: binds once, runs from any thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch

from effc.ir import EffcError, InputError, Number, Op, Weight, bind_symbols, interpret
from effc.ir.graph import row
from effc.ir.interpret import run_node

from ..base import Bound, Constants, Executable, Object, weight_values
from .binding import Binder
from .frame import Frame
from .memory import Root
from .plan import Plan, Program
from .sizes import Numbers
from .steps import HostCall, Packed

KEPT = 16  # idle frames; each holds an arena


class PlanExecutable(Executable):
    """Plan and kernels, built; no weights yet."""

    def __init__(
        self, plan: Plan, program: Program | None, graph: Any, native: bool = True,
        machine: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.program, self.graph = plan, program, graph
        self.native, self.machine = native, machine or {}
        self.launches = plan.launches
        self.kernels = {k.name: k.source for k in plan.kernels.values()}
        self.memory = plan.arena.nbytes

    @property
    def objects(self) -> tuple[Object, ...]:
        parts = self.program.parts if self.program is not None else ()
        try:
            return tuple(Object(p.name, p.source, p.library.read(), p.functions) for p in parts)
        except OSError as e:
            raise EffcError(
                "built kernels are no longer on disk", why=str(e), fix="compile the model again"
            ) from e

    def bind(
        self, weights: Mapping[str, torch.Tensor] | None = None, shared: Constants | None = None
    ) -> Bound:
        if self.program is None:
            raise RuntimeError("this plan was made without building its kernels")
        return BoundPlan(self.program, weights, shared)


class BoundPlan(Bound):
    """A plan with its weights."""

    def __init__(
        self, program: Program, weights: Mapping[str, torch.Tensor] | None,
        shared: Constants | None = None,
    ) -> None:  # fmt: skip
        self.program, self.plan = program, program.plan
        made = _Made(self.plan, weights, shared or Constants())
        self.constants = made.constants()
        with program.packing():
            self.packed = {p.slot: made.packed(p) for p in self.plan.packed}
        self._weights = dict(weights or {})
        self._numbers = [isinstance(i.of, Number) for i in self.plan.graph.inputs]
        self._no_numbers = not any(self._numbers)
        self._hosted = any(isinstance(s, HostCall) for s in self.plan.steps)
        self._bind = Binder(self.plan.graph)
        self._idle: dict[Any, list[Any]] = {}
        self._made = 0
        self._lock = threading.Lock()

    def again(self) -> BoundPlan:
        """The same weights, with frames of its own."""
        made = copy(self)
        made._idle, made._made, made._lock = {}, 0, threading.Lock()
        return made

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        try:
            if self._no_numbers:
                key: Any = tuple([x.shape for x in inputs])
            else:
                key = tuple([x if n else x.shape for x, n in zip(inputs, self._numbers)])
            idle = self._idle.get(key)
        except (AttributeError, TypeError):
            return self._refuse(inputs)
        try:
            frame = idle.pop()  # type: ignore[union-attr]  # None.pop is one of the cases below
        except (AttributeError, IndexError):  # none yet, or all in use by other threads
            frame = self._make(key, inputs)
        grad = self._hosted and torch.is_grad_enabled()  # kernels know no gradients
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            outputs = frame.run(inputs)
        finally:
            if grad:
                torch._C._set_grad_enabled(True)
            idle = self._idle.get(key)
            if idle is not None:  # else dropped meanwhile, to make room
                idle.append(frame)
        return self._apart(outputs, inputs) if self.plan.shared else outputs

    # -------------------------------------------------------------- frames

    def _refuse(self, inputs: Sequence[Any]) -> Any:
        bind_symbols(self.plan.graph, inputs)  # says what does not fit
        for node, x in zip(self.plan.graph.inputs, inputs):
            if isinstance(x, torch.Tensor) and x.device.type != self.program.device:
                here = {"cpu": "the CPU", "cuda": "a GPU"}[self.program.device]
                raise InputError(f"input {node.key} is on {x.device}, the plan runs on {here}")
        raise InputError(f"the inputs do not fit {self.plan.graph.name}")

    def _make(self, key: Any, inputs: Sequence[Any]) -> Any:
        env = self._bind(inputs)
        if self.plan.equal:
            numbers = Numbers(self.plan.sizes, env)
            if any(numbers(a) != numbers(b) for a, b in self.plan.equal):
                return self._keep(key, _Interpreted(self))
        with torch.no_grad(), self.program.packing():
            frame = Frame(self.program, self.constants, self.packed, env, self._refuse)
        return self._keep(key, frame)

    def _keep(self, key: Any, frame: Any) -> Any:
        """Make room for the frame among the idle ones: the sizes seen longest ago go first."""
        with self._lock:
            self._made += 1
            if self._made > KEPT:
                for old in list(self._idle):
                    self._made -= len(self._idle[old])
                    self._idle[old] = []
                    if old != key:
                        del self._idle[old]
                    if self._made <= KEPT // 2:
                        break
            self._idle.setdefault(key, [])
        return frame

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


class _Made:
    """What a plan needs of its weights, evaluated as far as it reads it."""

    def __init__(
        self, plan: Plan, weights: Mapping[str, torch.Tensor] | None, shared: Constants
    ) -> None:
        self.plan, self.shared = plan, shared
        self.values: dict[Op, Any] = {**weight_values(plan.graph, weights)}
        self.numbers: dict[Op, int] = {}
        for node in plan.graph.nodes:
            if isinstance(node, Weight):  # the graph's own values may differ under equal names
                own = None if node.key in (weights or {}) else id(node.data)
                self.numbers[node] = shared.number((node.key, own))
            elif node in plan.graph.constants:
                self.numbers[node] = shared.number(row(node, self.numbers))

    def constants(self) -> dict[Root, torch.Tensor]:
        with torch.no_grad():
            return {root: self._kept(node) for node, root in self.plan.constants.items()}

    def packed(self, p: Packed) -> Any:
        key = (self.numbers[p.source], p.what, p.key)
        return self.shared.once(key, lambda: p.make(self._value(p.source)))

    def _kept(self, node: Op) -> Any:
        """Shared are the values that plans read, not those on the way to them."""
        self.values[node] = self.shared.once(self.numbers[node], lambda: self._value(node))
        return self.values[node]

    def _value(self, node: Op) -> Any:
        if node in self.values:
            return self.values[node]
        waiting = [node]
        while waiting:
            top = waiting[-1]
            missing = [o for o in top.operands if o not in self.values]
            waiting += missing
            if not missing:
                waiting.pop()
                if top not in self.values:
                    self.values[top] = run_node(top, self.values, {})
        return self.values[node]


class _Interpreted:
    """For sizes that the plan's strides do not allow, such as a symbolic size that broadcasts."""

    def __init__(self, bound: BoundPlan) -> None:
        graph = bound.plan.graph
        new = weight_values(graph, bound._weights)
        self.graph = graph.substitute({w: type(w).holding(w.key, t, w.of) for w, t in new.items()})

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.no_grad():
            outputs = interpret(self.graph, inputs)
            first = len(outputs) - len(self.graph.states)
            states = [x for node, x in zip(self.graph.inputs, inputs) if node.state]
            new = [x.clone() for x in outputs[first:]]  # one may be another's old value
            taken = set(map(_storage, states))
            results = [o.clone() if _storage(o) in taken else o for o in outputs[:first]]
            return (*results, *(x.copy_(value) for x, value in zip(states, new)))


__all__ = ["BoundPlan", "PlanExecutable"]
