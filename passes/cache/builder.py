"""The graph over new positions, made from the roles in which each value is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from effc.ir import Dim, Graph, Input, Op, Tensor, symbol
from effc.ir.op import map_values
from effc.ir.rewrite import op as ops
from effc.ir.specialise import replaced
from effc.ir.symbols import product
from effc.ir.types import DTYPES, i64
from effc.passes.analysis.roles import ALL, Demand, Positions, Role, over_positions, pieces

from .demands import Plan, is_kept, now


class Builder:
    """Makes every value once for each role in which it is needed, operands first.

    attentions: how many were given states.
    """

    def __init__(self, g: Graph, p: Positions, plan: Plan) -> None:
        self.g, self.p, self.plan = g, p, plan
        self.taken = {s.name for s in g.all_symbols} | {i.key for i in g.inputs}
        self.capacity = symbol(self._free("C"))
        self.past = Input(self._free("past"), Tensor((), i64))
        self.made: dict[tuple[Op, Demand], Op] = {}
        self.states: dict[Input, Op] = {}  # and their new values
        self.caches: dict[tuple[Op, int], Op] = {}  # new rows, their dimension -> all rows
        self.places: dict[int, Op] = {}
        self.attentions = 0

    def graph(self) -> Graph:
        inputs = [self._input(i) for i in self.g.inputs]
        for node in self.g.nodes:
            for demand, needs in self.plan[node].items():
                operands = list(map(self._get, node.operands, needs))
                made = self._make(node, demand, operands)
                assert made.shape == self._sizes(node.shape, demand), (node, demand, made)
                self.made[node, demand] = made if made.origins else made.from_(node)
        outputs = [self._get(o, self.p.demand(o)) for o in self.g.outputs]
        order = [v for v in self.made.values() if not isinstance(v, Input)]
        inputs += [self.past, *self.states]
        outputs += self.states.values()
        return Graph(tuple(inputs), (), tuple(outputs), self.g.name).with_nodes(order)

    def _get(self, value: Op, demand: Demand) -> Op:
        return self.made[value, demand]

    def _free(self, name: str) -> str:
        """A name that no input and no size has."""
        found, count = name, 0
        while found in self.taken:
            found, count = f"{name}_{count}", count + 1
        self.taken.add(found)
        return found

    # -------------------------------------------------------------- sizes, places, rows

    def _size(self, size: Dim, role: Role) -> Dim:
        if role == ALL:
            return replaced(size, {self.p.size: self.capacity})
        return self.p.size if role is not None and self.p.offset(size) is not None else size

    def _sizes(self, shape: tuple[Dim, ...], demand: Demand) -> tuple[Dim, ...]:
        return tuple(map(self._size, shape, demand))

    def _place(self, shift: int) -> Op:
        """The positions of the new rows, shifted: past + shift + i; 0 where that is negative."""
        if shift not in self.places:
            made = ops.add(ops.arange(self.p.size, i64, shift), self.past)
            self.places[shift] = ops.clamp(made, 0, None) if shift < 0 else made
        return self.places[shift]

    def _rows(self, x: Op, axis: int, shift: int) -> Op:
        """The new rows, shifted, out of all of them."""
        return taken(x, axis, self._place(shift))

    def _all_rows(self, new: Op, axis: int, name: str) -> Op:
        """A state with the new rows written into it."""
        if (new, axis) not in self.caches:
            shape = (*new.shape[:axis], self.capacity, *new.shape[axis + 1 :])
            state = Input(self._free(name), Tensor(shape, new.dtype), state=True)
            made = ops.update(state, new, self.past, axis).from_(new)
            self.caches[new, axis] = self.states[state] = made
        return self.caches[new, axis]

    def _earlier(self, new: Op, demand: Demand) -> Op:
        """Shifted rows of a value of which the new rows are at hand."""
        for axis, role in enumerate(demand):
            if isinstance(role, int) and role < 0:
                everything = self._all_rows(new, axis, f"x{len(self.states)}")
                new = self._rows(everything, axis, role)
        return new

    # -------------------------------------------------------------- inputs

    def _input(self, given: Input) -> Input:
        """The input over new positions; over all of them where all are needed."""
        plan = self.plan[given]
        if not any(self.p.in_shape(given)):
            self.made |= {(given, demand): given for demand in plan}
            return given
        whole = [any(d[axis] == ALL for d in plan) for axis in range(len(given.shape))]
        roles = tuple(ALL if w else r for w, r in zip(whole, self.p.demand(given), strict=True))
        shape = self._sizes(given.shape, roles)
        new = given if shape == given.shape else given.replace(of=given.tensor.with_(shape=shape))
        for demand in plan:
            value: Op = new
            for axis, role in enumerate(demand):
                if whole[axis] and isinstance(role, int):
                    value = self._rows(value, axis, role)
            left = tuple(None if w else r for w, r in zip(whole, demand, strict=True))
            self.made[given, demand] = self._earlier(value, left)
        return new

    # -------------------------------------------------------------- nodes

    def _make(self, node: Op, demand: Demand, operands: list[Op]) -> Op:
        if is_kept(self.p, node, demand):
            return self._earlier(self.made[node, now(demand)], demand)
        if not self.p.touched(node):
            return node.map_operands(dict(zip(node.operands, operands)).__getitem__)
        return MAKERS.get(node.name, Builder._same)(self, node, demand, operands)

    def _same(self, node: Op, demand: Demand, operands: list[Op], **changes: Any) -> Op:
        """The op on other operands, which keep their order."""
        rest: Iterator[Op] = iter(operands)
        values = {f.name: getattr(node, f.name) for f in node.fields} | changes
        for f in node.fields:
            if f.kind == "operand":
                values[f.name] = map_values(values[f.name], lambda o: next(rest))
        return type(node)(**values).from_(node)

    def _reshape(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        return self._same(node, demand, operands, to=self._sizes(node.to, demand))

    def _slice(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        (x,) = operands
        axis = node.dim % len(node.shape)
        role = demand[axis]
        if not isinstance(role, int):
            env = {self.p.size: self.capacity} if role == ALL else {}
            start, size = replaced(node.start, env), replaced(node.size, env)
            return self._same(node, demand, operands, start=start, size=size)
        if self.p.over(node.x.shape[axis]):
            return x  # the shift is in the role of x
        return self._rows(x, axis, role + node.start)

    def _cat(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        axis = node.dim % len(node.shape)
        role = demand[axis]
        if not isinstance(role, int):
            return self._same(node, demand, operands)
        before, index = pieces(self.p, node)  # type: ignore[misc]
        return self._after(operands[:index], before, operands[index], axis, role)

    def _pad(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        (x,) = operands
        before, after = list(node.before), list(node.after)
        for axis, role in enumerate(demand):
            if isinstance(role, int):
                fill = ops.full((1,) * len(node.shape), node.value, node.dtype)
                x = self._after([fill], before[axis], x, axis, role)
                before[axis] = after[axis] = 0
        if not any((*before, *after)):
            return x
        return self._same(node, demand, [x], before=tuple(before), after=tuple(after))

    def _after(self, firsts: list[Op], before: int, x: Op, axis: int, shift: int) -> Op:
        """Row by row: one of the first `before` positions, or x, whose rows are shifted already."""
        first = firsts[0] if len(firsts) == 1 else ops.cat(tuple(firsts), axis)
        place = self._place(shift)
        shape = tuple(self.p.size if i == axis else 1 for i in range(len(x.shape)))
        is_first = ops.lt(ops.reshape(place, shape), before)
        if first.shape[axis] != 1:
            first = taken(first, axis, ops.clamp(place, 0, before - 1))
        return ops.where(is_first, first, x)

    def _arange(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        (role,) = demand
        if role == ALL:
            return self._same(node, demand, operands, size=self._size(node.size, role))
        assert isinstance(role, int)
        place = self._place(role)
        if (node.start, node.step) == (0, 1):
            return place if node.dtype == i64 else ops.cast(place, node.dtype)
        exact = ops.cast(place, DTYPES["f64"]) if node.dtype.is_float else place
        return ops.cast(ops.add(ops.mul(exact, node.step), node.start), node.dtype)

    def _aten(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        """One of the operators that run along positions: all of them, then the new rows."""
        axis = node.args[1] % len(demand)
        whole = tuple(ALL if i == axis and r is not None else r for i, r in enumerate(demand))
        of = node.tensor.with_(shape=self._sizes(node.shape, whole))
        made = self._same(node, demand, operands, of=of)
        role = demand[axis]
        return self._rows(made, axis, role) if isinstance(role, int) else made

    def _attention(self, node: Any, demand: Demand, operands: list[Op]) -> Op:
        if not over_positions(self.p, node):
            return self._same(node, demand, operands)
        q, k, v, *mask = operands
        keys = self._all_rows(k, len(k.shape) - 2, f"k{self.attentions}")
        values = self._all_rows(v, len(v.shape) - 2, f"v{self.attentions}")
        self.attentions += 1
        return node.replace(q=q, k=keys, v=values, mask=mask[0] if mask else None, past=self.past)


MAKERS: dict[str, Callable[..., Op]] = {
    "reshape": Builder._reshape, "expand": Builder._reshape, "full": Builder._reshape,
    "slice": Builder._slice, "cat": Builder._cat, "pad": Builder._pad, "arange": Builder._arange,
    "aten": Builder._aten, "attention": Builder._attention,
}  # fmt: skip


def taken(x: Op, axis: int, places: Op) -> Op:
    """Some rows of x along one dimension, as a look-up in a table."""
    rank = len(x.shape)
    order = (axis, *(i for i in range(rank) if i != axis))
    first = ops.permute(x, order) if axis else x
    rest = first.shape[1:]
    table = first if rank == 2 else ops.reshape(first, (first.shape[0], product(rest)))
    rows = ops.embedding(table, places)
    rows = rows if rank == 2 else ops.reshape(rows, (places.shape[0], *rest))
    return ops.permute(rows, tuple(order.index(i) for i in range(rank))) if axis else rows


__all__ = ["Builder"]
