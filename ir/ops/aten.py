"""Any torch operator that has no declaration of its own, kept whole, by its schema.

Text: `y3: f32[8, 4] = aten.cumsum.default(y2, 1)`. The annotation is the type; nothing is inferred.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import OpError
from ..op import Cost, Op, Operand, op
from ..types import Type


@op("aten")
class Aten(Op):
    """torch.ops.<target>(*args, **kwargs)."""

    target: str  # "aten.cumsum.default"
    args: tuple[Operand, ...]
    kwargs: tuple[Operand, ...]  # ((name, value), ...)
    of: Type

    @property
    def random(self) -> bool:  # type: ignore[override]
        target = overload(self.target)
        # What gives no result is called for its effect (an assertion): it keeps its place as well.
        return torch.Tag.nondeterministic_seeded in target.tags or not target._schema.returns

    @property
    def view(self) -> bool:  # type: ignore[override]
        """The schema says that a result may alias an argument."""
        schema = overload(self.target)._schema
        return any(r.alias_info is not None for r in schema.returns) or "(a)" in str(schema)

    def infer(self) -> Type:
        overload(self.target)
        return self.of

    def reference(self, args: Any, kwargs: Any) -> Any:
        result = overload(self.target)(*map(_listed, args), **{k: _listed(v) for k, v in kwargs})
        return () if result is None else result

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


def overload(target: str) -> torch._ops.OpOverload:
    """`namespace.name.overload` -> the torch operator; OpError when this torch has none."""
    space, _, rest = target.partition(".")
    name, _, which = rest.rpartition(".")
    packet = getattr(getattr(torch.ops, space), name, None) if name else None
    if packet is None or not hasattr(packet, which):
        fix = "check the name, or the torch version"
        raise OpError(f"this torch has no operator {target}", fix=fix)
    return getattr(packet, which)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value
