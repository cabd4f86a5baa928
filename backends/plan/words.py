"""The calls of a segment as the runner reads them: integers in a row, with a call's sizes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effc.codegen.cpp.kernel import Kernel
from effc.ir.symbols import symbolic

from .sizes import Numbers, Sizes
from .steps import KernelCall


class Words:
    """Words of one segment; those that depend on sizes are noted once and filled in fast."""

    def __init__(
        self, calls: Sequence[KernelCall], address: Callable[[Any], int], sizes: Sizes
    ) -> None:
        self.template: list[int] = []
        self.places: list[int] = []  # in the template
        self.indices: list[int] = []  # of an expression among the sizes
        self.factors: list[int] = []
        self.reals: list[tuple[int, Any]] = []
        for call in calls:
            self.template += [address(call.kernel), len(call.refs), len(call.numbers)]
            for ref in call.refs:
                self.template.append(ref.root.number)
                self._add(ref.offset, ref.dtype.bits // 8, sizes)
            for number in call.numbers:
                if isinstance(number, Kernel):
                    self.template.append(address(number))
                else:
                    self._add(number, 1, sizes)
        self.data = np.array(self.template, dtype=np.int64)
        self._places = np.array(self.places, dtype=np.intp)
        self._indices = np.array(self.indices, dtype=np.intp)
        self._factors = np.array(self.factors, dtype=np.int64)

    def _add(self, value: Any, factor: int, sizes: Sizes) -> None:
        if isinstance(value, float):
            self.template.append(_bits(value))
            return
        if not symbolic(value):
            self.template.append(value * factor)
            return
        if not value.is_integer:
            self.reals.append((len(self.template), value))
        elif value.free_symbols:
            self.places.append(len(self.template))
            self.indices.append(sizes.index[value])
            self.factors.append(factor)
        self.template.append(0 if value.free_symbols or not value.is_integer else int(value))

    def fill(self, numbers: Numbers) -> np.ndarray:
        """The words of one set of sizes."""
        data = self.data.copy()
        if len(self._places):
            data[self._places] = numbers.integers[self._indices] * self._factors
        for place, value in self.reals:
            data[place] = _bits(numbers(value))
        return data


def _bits(value: float) -> int:
    """A float as the word that carries it."""
    return struct.unpack("q", struct.pack("d", value))[0]
