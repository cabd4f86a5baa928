"""Rotary position embedding written by hand, recognised: rules of raise-ops."""

from __future__ import annotations

from typing import Any

from effc.ir import Op, Rule, Tensor, no, yes
from effc.ir.ops.aten import Aten
from effc.ir.rewrite import op as ops


class RaiseRope(Rule):
    """x * cos + rotate(x) * sin => rope(x, cos, sin), rotating halves or neighbours"""

    def pattern(self, op, x, cos, sin, turned):
        return op.add(op.mul(x, cos), op.mul(turned, sin))

    def check(self, m, x, cos, sin, turned):
        found = self.find(x, cos, sin, turned)
        if found is None:
            return no("neither factor is the other, rotated", at=m.root)
        x, cos, sin, _ = found
        if not isinstance(cos, Op) or not isinstance(sin, Op):
            return no("cos or sin is a number", at=m.root)
        made = ops.rope(x, cos, sin)
        return yes if made.type == m.root.type else no("rope would give {}", made.type)

    def find(self, *given: Any) -> tuple[Any, Any, Any, bool] | None:
        """x, cos, sin and which rotation: addition and both products match either way round."""
        x, cos, sin, turned = given
        for a, c in ((x, cos), (cos, x)):
            for t, s in ((turned, sin), (sin, turned)):
                for first, second in (((a, c), (t, s)), ((t, s), (a, c))):
                    interleaved = is_rotation(second[0], first[0])
                    if interleaved is not None:
                        return first[0], first[1], second[1], interleaved
        return None

    def rewrite(self, op, m, x, cos, sin, turned):
        found = self.find(x, cos, sin, turned)
        assert found is not None
        return op.rope(found[0], found[1], found[2], found[3])


def is_rotation(turned: Any, x: Any) -> bool | None:
    """False: halves of x swapped, True: neighbours swapped, None: not x rotated."""
    if not (isinstance(turned, Op) and isinstance(x, Op)) or turned.type != x.type:
        return None
    if turned.name == "cast" and x.name == "cast":  # moving and negating commute with a cast
        turned, x = turned.x, x.x
        if turned.type != x.type:
            return None
    if turned.name == "cat":
        return False if _halves(turned, x) else None
    if turned.name == "reshape" and turned.x.name == "cat":
        return True if _neighbours(turned.x, x) else None
    return None


def _halves(cat: Any, x: Op) -> bool:
    """cat((-x[half:], x[:half]))"""
    size = x.shape[-1]
    if len(cat.xs) != 2 or not _last(cat, cat.dim) or not isinstance(size, int) or size % 2:
        return False
    high, low = cat.xs
    half = size // 2
    return high.name == "neg" and _part(high.x, x, half, half) and _part(low, x, 0, half)


def _part(node: Any, x: Op, start: int, size: int, step: int = 1) -> bool:
    """node is x[start : : step], taken from x or, where x is a slice, from what x is a slice of."""
    if node.name != "slice" or not _last(x, node.dim) or (node.size, node.step) != (size, step):
        return False
    return any(node.x is base and node.start == at + start for base, at in _bases(x))


def _bases(x: Any) -> list[tuple[Op, Any]]:
    if x.name == "slice" and x.step == 1 and _last(x, x.dim):
        return [(x, 0), (x.x, x.start)]
    return [(x, 0)]


def _last(node: Op, axis: int) -> bool:
    return axis % node.tensor.rank == node.tensor.rank - 1


def _neighbours(cat: Any, x: Op) -> bool:
    """cat((-x[1::2], x[0::2])) along a new last dimension"""
    size = x.shape[-1]
    if len(cat.xs) != 2 or not _last(cat, cat.dim) or not isinstance(size, int) or size % 2:
        return False
    if cat.shape != (*x.shape[:-1], size // 2, 2):
        return False
    odd, even = (_lane(part, x, size // 2) for part in cat.xs)
    return odd == (1, -1) and even == (0, 1)


def _lane(node: Any, x: Op, half: int) -> tuple[int, int] | None:
    """Which of two neighbours (0 or 1), and its sign."""
    sign = 1
    while node.name in ("reshape", "neg"):
        sign = -sign if node.name == "neg" else sign
        node = node.x
    if node.name != "slice" or not _last(node.x, node.dim):
        return None
    for start in (0, 1):
        if _part(node, x, start, half, 2):
            return start, sign
    pairs = node.x
    if pairs.name == "reshape" and pairs.x is x and pairs.shape == (*x.shape[:-1], half, 2):
        return (node.start, sign) if node.size == 1 else None
    return None


class RaiseComplexRope(Rule):
    """view_as_real(view_as_complex(x) * freqs) => rope(x, real(freqs), imag(freqs), interleaved)"""

    def pattern(self, op):
        return op.reshape(op.aten(target="aten.view_as_real.default").named("real"))

    def check(self, m):
        found = self.find(m.root)
        if found is None:
            return no("it is not the product of a complex view and frequencies", at=m.real)
        x, freqs = found
        if freqs.shape[-1:] != (x.shape[-1] // 2,):
            return no("the frequencies are {}, x is {}", freqs.type, x.type, at=freqs)
        for node in (m.real.args[0], m.real.args[0].args[0]):
            if m.uses(node) > 1:
                return no("{} is used elsewhere", node.name, at=node)
        made = self.rewrite(ops, m)
        return yes if made.type == m.root.type else no("rope would give {}", made.type)

    def find(self, root: Any) -> tuple[Op, Op] | None:
        product = root.x.args[0]
        if getattr(product, "target", "") != "aten.mul.Tensor":
            return None
        for x, freqs in (product.args[:2], product.args[1::-1]):
            if getattr(x, "target", "") == "aten.view_as_complex.default":
                pairs = x.args[0]
                if pairs.name == "reshape" and pairs.x.shape == root.shape:
                    if isinstance(freqs, Op) and isinstance(root.shape[-1], int):
                        return pairs.x, freqs
        return None

    def rewrite(self, op, m):
        found = self.find(m.root)
        assert found is not None
        x, freqs = found
        lanes = (*freqs.shape, 2)
        real = Aten("aten.view_as_real.default", (freqs,), (), Tensor(lanes, x.dtype))
        flat = (*freqs.shape[:-1], x.shape[-1])
        cos, sin = (
            op.reshape(op.expand(op.slice(real, len(lanes) - 1, i, 1), lanes), flat)
            for i in range(2)
        )
        return op.rope(x, cos, sin, True)


RULES = (RaiseRope(), RaiseComplexRope())
