"""One call's worth of memory: values, the arena, addresses and steps, for one set of input sizes.

A bound plan keeps frames in a pool. A call takes one out, so several threads never share one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from effc.ir import InputError, Op

from .memory import Root, packed
from .plan import Program
from .sizes import Numbers
from .steps import HostCall


class Frame:
    """Ready to run: everything that does not depend on the values of inputs is looked up."""

    def __init__(
        self, program: Program, constants: Mapping[Root, torch.Tensor],
        packed_constants: Mapping[int, Any], env: Mapping[Any, Any],
        refuse: Callable[[Sequence[Any]], None],
    ) -> None:  # fmt: skip
        plan = program.plan
        self.program, self.plan = program, plan
        self.numbers = Numbers(plan.sizes, env)
        self.nothing = plan.slots  # the slot of None
        self.values: list[Any] = [None] * (plan.slots + 1 + len(plan.inputs))
        self.table = (ctypes.c_int64 * max(1, len(plan.numbered)))()
        self.device = torch.device(program.device)
        self.error = program.error_word()
        self.kept: list[Any] = []
        for slot, value in packed_constants.items():
            self.values[slot] = value
        self._constants(constants)
        self.memory = self._arena()
        names = self._names(refuse)
        exec(program.driver, names)
        self.run: Callable[[Sequence[Any]], tuple[Any, ...]] = names["run"]

    def _names(self, refuse: Callable[[Sequence[Any]], None]) -> dict[str, Any]:
        """What the driver's text refers to."""
        names: dict[str, Any] = {
            "values": self.values, "table": self.table, "pack": self._packed,
            "empty": self.program.empty, "addresses": ctypes.addressof(self.table),
            "refuse": refuse, "error": self.error, "out_of_range": self._out_of_range,
            "threads": self.program.resource, "overlap": self._overlap,
        }  # fmt: skip
        for i, root in enumerate(self.plan.inputs):
            if isinstance(root, Root):
                names[f"dtype{i}"] = root.dtype.torch
                names[f"strides{root.slot}"] = self.numbers(root.strides)
        for root in self.plan.output_roots:
            names[f"shape{root.slot}"] = self.numbers(root.shape)
            names[f"strides{root.slot}"] = self.numbers(root.strides)
            names[f"dtype_{root.slot}"] = root.dtype.torch
        for at, group in self.plan.segments():
            if isinstance(group, HostCall):
                names[f"step{at}"] = group.make(self)
            else:
                names["native"] = names.get("native") or self.program.native()
                words = self.program.words[at].fill(self.numbers)
                self.kept.append(words)
                names[f"data{at}"] = words.ctypes.data
        return names

    def _packed(self, t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        return packed(t, strides, self.plan.alignment)

    def _out_of_range(self) -> None:
        self.error[0] = 0
        raise IndexError("index out of range in self")

    def _overlap(self, inputs: Sequence[Any]) -> None:
        """Two tensors begin at one address: refused where one is a state and both have elements."""
        places: dict[int, Any] = {}
        for node, x in zip(self.plan.graph.inputs, inputs):
            if not isinstance(x, torch.Tensor) or not x.numel():
                continue
            other = places.setdefault(x.data_ptr(), node)
            if other is not node and (other.state or node.state):
                raise InputError(
                    f"inputs {other.key} and {node.key} are the same memory",
                    why="a state is overwritten with its new value",
                    fix="give each state a tensor of its own",
                )

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
        values, slot, alignment = self.values, root.slot, self.plan.alignment

        def publish(t: torch.Tensor) -> None:
            if t.stride() != want or not want or t.data_ptr() % alignment:
                t = values[slot] = packed(t, want, alignment)
            table[number] = t.data_ptr()

        return publish

    # -------------------------------------------------------------- memory

    def _constants(self, constants: Mapping[Root, torch.Tensor]) -> None:
        for root, value in constants.items():
            self.values[root.slot] = value
            if root.number >= 0:
                lying = self._packed(value, self.numbers(root.strides))
                self.kept.append(lying)
                self.table[root.number] = lying.data_ptr()
        for root in self.plan.numbered:
            if root.kind == "error":
                self.table[root.number] = self.error.data_ptr()
            elif root.kind == "packed":
                self.table[root.number] = self.values[root.slot].data_ptr()

    def _arena(self) -> int:
        offsets, total = self.plan.arena.offsets(self.numbers)
        self.arena = torch.empty(total + 64, dtype=torch.uint8, device=self.device)  # never empty
        base = self.arena.data_ptr()
        at = dict(zip(self.plan.arena.roots, offsets))
        for root, offset in at.items():
            if root.number >= 0:
                self.table[root.number] = base + offset
        for window in self.plan.windows:
            root = window.ref.root
            shape, strides, offset = self.numbers(
                (window.ref.shape, window.ref.strides, window.ref.offset)
            )
            size = root.dtype.bits // 8
            dtype: Any = root.dtype.torch
            typed = self.arena[: self.arena.numel() // size * size].view(dtype)
            self.values[window.slot] = typed.as_strided(shape, strides, at[root] // size + offset)
        return total


__all__ = ["Frame"]
