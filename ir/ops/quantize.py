"""Compressed values: made of their parts, made of numbers, and read as numbers.

    w: uint4[576, 1536] @ GroupQuant(group=32, scale=f16, zero=uint4) = encoded((w0, w1, w2))
    a: int8[T, 1536] @ GroupQuant(group=None, scale=f32, zero=None) = quantize(x, ...)
    y: f32[T, 576] = linear(decode(a), decode(w))

What the numbers are multiplied in is the same everywhere: a target may compute a product from the
codes where both its operands are decoded, and reads no dense copy of either.
"""

from __future__ import annotations

from typing import Any

from ..formats import Encoded, GroupQuant, decoded
from ..formats import quantize as nearest_codes
from ..op import Cost, Op, Value, op
from ..types import Dense, DType, Format, Tensor, Type, f32, type_text


@op("encoded")
class MakeEncoded(Op):
    """The value of a format that is stored in these parts, in the order in which it names them."""

    xs: tuple[Value, ...]
    of: Tensor

    view = True

    def infer(self) -> Type:
        if not isinstance(self.of, Tensor) or isinstance(self.of.format, Dense):
            raise self.fail(f"{type_text(self.of)} has no parts; it is one tensor")
        parts = self.of.format.parts(self.of)
        wanted = ", ".join(f"{name}: {t}" for name, t in parts.items())
        if [x.type for x in self.xs] != list(parts.values()):
            raise self.fail(f"the parts of {self.of} are {wanted}")
        return self.of

    def reference(self, xs: Any) -> Encoded:
        return Encoded(self.of, tuple(xs))

    def cost(self) -> Cost:
        return Cost(0, 0)


@op("decode")
class Decode(Op):
    """The numbers that a compressed value stands for, computed in float32.

    Who reads them reads the compressed value: this moves no bytes of its own.
    """

    x: Value
    dtype_: DType = f32

    def infer(self) -> Type:
        if isinstance(self.x.tensor.format, Dense):
            raise self.fail("the value is dense already")
        if not self.dtype_.is_float:
            raise self.fail(f"{self.dtype_} holds no such numbers")
        return Tensor(self.x.shape, self.dtype_)

    @property
    def read_type(self) -> Type:
        return self.x.type

    def reference(self, x: Any) -> Any:
        return decoded(x.type, x, self.dtype_.torch)  # type: ignore[arg-type]

    def cost(self) -> Cost:
        return Cost(0, 0)


@op("quantize")
class Quantize(Op):
    """The nearest codes, with a scale (and zero) for every group of a row, from its own range.

    Without a zero: scale = max|x| / largest code; with one: (max(x, 0) - min(x, 0)) / (number of
    codes - 1), zero = round(-min(x, 0) / scale) + least code. code = round(x / scale) + zero.
    (ABQ-LLM, section 2.1, with 0 always in the range.)
    """

    x: Value
    dtype_: DType
    format: Format

    def infer(self) -> Type:
        if not self.x.dtype.is_float or not isinstance(self.x.tensor.format, Dense):
            raise self.fail("only dense floats are quantised")
        if not isinstance(self.format, GroupQuant):
            raise self.fail(f"no rule to quantise to {self.format}")
        made = Tensor(self.x.shape, self.dtype_, format=self.format)
        self.format.parts(made)  # raises where the type cannot be
        return made

    def reference(self, x: Any) -> Encoded:
        assert isinstance(self.type, Tensor)
        return nearest_codes(x, self.type.with_(shape=tuple(x.shape)))

    def cost(self) -> Cost:
        return Cost(4 * self.x.tensor.numel, self.bytes_moved())
