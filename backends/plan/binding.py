"""Reads the sizes of a call off its inputs, without sympy; misfits go to the reference binder,
which says what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effc.ir import Graph, Number, Tensor, bind_symbols
from effc.ir.symbols import symbolic

from .sizes import compile_exprs

if TYPE_CHECKING:
    import sympy


class Binder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ranks: list[int | None] = []  # None for numbers
        self.symbols: list[tuple[sympy.Symbol, int, int]] = []  # first seen at input, axis
        self.fixed: list[tuple[int, int, int]] = []
        self.same: list[tuple[int, int, sympy.Symbol]] = []
        derived: list[tuple[int, int, sympy.Basic]] = []
        seen: set[sympy.Symbol] = set()
        for i, node in enumerate(graph.inputs):
            if isinstance(node.of, Number):
                self.ranks.append(None)
                self.symbols.append((node.symbol, i, -1))
                seen.add(node.symbol)
                continue
            assert isinstance(node.of, Tensor)
            self.ranks.append(node.of.rank)
            for axis, size in enumerate(node.of.shape):
                if isinstance(size, int):
                    self.fixed.append((i, axis, size))
                elif not (symbolic(size) and size.is_Symbol):
                    derived.append((i, axis, size))
                elif size in seen:
                    self.same.append((i, axis, size))
                else:
                    seen.add(size)
                    self.symbols.append((size, i, axis))
        self.derived = [(i, axis) for i, axis, _ in derived]
        self.evaluate = compile_exprs(tuple(e for _, _, e in derived))

    def __call__(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, Any]:
        """Numbers behind the symbols. Raises InputError where an input has another shape."""
        if not self._ranks_fit(inputs):
            return bind_symbols(self.graph, inputs)
        shapes: list[Any] = [None if r is None else x.shape for x, r in zip(inputs, self.ranks)]
        env = {
            s: inputs[i] if shapes[i] is None else shapes[i][axis] for s, i, axis in self.symbols
        }
        fits = all(shapes[i][axis] == size for i, axis, size in self.fixed)
        fits = fits and all(shapes[i][axis] == env[s] for i, axis, s in self.same)
        if fits and self.derived:
            values = self.evaluate(env)
            fits = all(
                shapes[i][axis] == v for (i, axis), v in zip(self.derived, values, strict=True)
            )
        return env if fits else bind_symbols(self.graph, inputs)

    def _ranks_fit(self, inputs: Sequence[Any]) -> bool:
        return len(inputs) == len(self.ranks) and all(
            r is None or len(x.shape) == r for x, r in zip(inputs, self.ranks)
        )
