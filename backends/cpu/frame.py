"""One call's worth of memory: values, the arena, addresses and steps, for one set of input sizes.

A bound plan keeps frames in a pool. A call takes one out, so several threads never share one.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from effc.ir import Op

from .builder import HostCall, KernelCall
from .memory import Root, aligned, assign, packed
from .plan import Program
from .sizes import Numbers

_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", torch.empty_strided)

class Frame:
    """Ready to run: everything that does not depend on the values of inputs is looked up."""

    def __init__(
        self, program: Program, constants: Mapping[Root, torch.Tensor],
        packed_constants: Mapping[int, Any], env: Mapping[Any, Any],
    ) -> None:  # fmt: skip
        plan = program.plan
        self.program, self.plan = program, plan
        self.numbers = Numbers(plan.sizes, env)
        self.nothing = plan.slots  # the slot of None
        self.values: list[Any] = [None] * (plan.slots + 1)
        self.table = (ctypes.c_int64 * max(1, len(plan.numbered)))()
        self.kept: list[Any] = []
        self._constants(constants)
        self._error_word()
        for slot, value in packed_constants.items():
            self.values[slot] = value
        self.memory = self._arena()
        self.takes = [self._take(root) for root in plan.inputs]
        self.steps = [*map(self._allocation, plan.output_roots), *self._steps()]
        self._template = list(self.values)

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        values = self.values
        try:
            for take, x in zip(self.takes, inputs):
                take(x)
            for step in self.steps:
                step()
            return tuple([values[slot] for slot in self.plan.outputs])
        finally:
            values[:] = self._template

    def bind(self, node: Op) -> Any:
        """The node with its symbols replaced by the numbers of this frame."""
        if not node.symbols:
            return node
        bound = object.__new__(type(node))
        bound.__dict__.update(node.__dict__)
        for f in node.fields:
            if f.kind != "region":
                bound.__dict__[f.name] = self.numbers(getattr(node, f.name))
        bound.__dict__.pop("operands", None)
        return bound

    def publisher(self, root: Root) -> Callable[[torch.Tensor], None] | None:
        """How to tell kernels where a tensor lies; None where no kernel reads it."""
        if root.number < 0:
            return None
        table, number, want = self.table, root.number, self.numbers(root.strides)
        values, slot = self.values, root.slot
        if root.kind == "input":  # outputs that are views of it show the tensor as given
            slot = len(values)
            values.append(None)

        def publish(t: torch.Tensor) -> None:
            if t.stride() != want or not want:
                t = values[slot] = packed(t, want)
            table[number] = t.data_ptr()

        return publish

    # -------------------------------------------------------------- memory

    def _constants(self, constants: Mapping[Root, torch.Tensor]) -> None:
        for root, value in constants.items():
            self.values[root.slot] = value
            if root.number >= 0:
                lying = packed(value, self.numbers(root.strides))
                self.kept.append(lying)
                self.table[root.number] = lying.data_ptr()

    def _error_word(self) -> None:
        self.error = np.zeros(1, dtype=np.int64)
        for root in self.plan.numbered:
            if root.kind == "error":
                self.table[root.number] = self.error.ctypes.data

    def _arena(self) -> int:
        ours = [r for r in self.plan.roots if r.kind == "arena"]
        sizes = [aligned(self.numbers(r.nbytes)) for r in ours]
        lives = [(r.first, r.last) for r in ours]
        offsets, total = assign(sizes, lives)
        self.arena = torch.empty(total + 64, dtype=torch.uint8)  # an empty tensor has no address
        base = self.arena.data_ptr()
        at = dict(zip(ours, offsets))
        for root in ours:
            if root.number >= 0:
                self.table[root.number] = base + at[root]
        for window in self.plan.windows:
            root = window.ref.root
            shape, strides, offset = self.numbers(
                (window.ref.shape, window.ref.strides, window.ref.offset)
            )
            size = root.dtype.bits // 8
            typed = self.arena[: self.arena.numel() // size * size].view(root.dtype.torch)
            self.values[window.slot] = typed.as_strided(shape, strides, at[root] // size + offset)
        return total

    def _allocation(self, root: Root) -> Callable[[], None]:
        values, table, slot, number = self.values, self.table, root.slot, root.number
        shape, strides = self.numbers((root.shape, root.strides))
        dtype = root.dtype.torch

        def step() -> None:
            t = values[slot] = _empty(shape, strides, dtype)
            table[number] = t.data_ptr()

        return step

    def _take(self, root: Root | int) -> Callable[[Any], None]:
        values = self.values
        if isinstance(root, int):
            return lambda x: values.__setitem__(root, x)
        slot, publish = root.slot, self.publisher(root)

        def take(x: torch.Tensor) -> None:
            values[slot] = x
            if publish is not None:
                publish(x)

        return take

    # -------------------------------------------------------------- steps

    def _steps(self) -> list[Callable[[], None]]:
        made: list[Callable[[], None]] = []
        drops = self.plan.drops
        for first, group in self.plan.segments():
            if isinstance(group, HostCall):
                step = group.make(self)
            else:
                step = self._segment(group)
            gone = [s for i in range(first, first + (len(group) if isinstance(group, list) else 1))
                    for s in drops.get(i, ())]  # fmt: skip
            made.append(_dropping(step, self.values, gone) if gone else step)
        return made

    def _segment(self, calls: list[KernelCall]) -> Callable[[], None]:
        """One native call for consecutive kernels."""
        words: list[int] = []
        for call in calls:
            numbers = [_word(n, self.numbers(n)) for n in call.numbers]
            words += [self.program.address(call.kernel), len(call.refs), len(numbers)]
            for ref in call.refs:
                words += [ref.root.number, self.numbers(ref.offset) * (ref.dtype.bits // 8)]
            words += numbers
        data = np.array(words, dtype=np.int64)
        self.kept.append(data)
        run, count, at = self.program.run, len(calls), data.ctypes.data
        table, limit = ctypes.addressof(self.table), self.program.threads
        threads = torch.get_num_threads if limit is None else lambda: limit
        if any(ref.root.kind == "error" for call in calls for ref in call.refs):
            error = self.error

            def checked() -> None:
                run(at, count, table, threads())
                if error[0]:
                    error[0] = 0
                    raise IndexError("index out of range in self")

            return checked
        return lambda: run(at, count, table, threads())  # the user may change threads at any time


def _word(expression: Any, value: int | float) -> int:
    """A number as kernels take it: an integer, or the bits of a double."""
    if isinstance(expression, int) or expression.is_integer:
        return int(value)
    return struct.unpack("q", struct.pack("d", value))[0]


def _dropping(step: Callable[[], None], values: list[Any], gone: list[int]) -> Callable[[], None]:
    def both() -> None:
        step()
        for slot in gone:
            values[slot] = None

    return both


__all__ = ["Frame"]
