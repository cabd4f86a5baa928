"""The order of dimensions in memory: channels last where convolutions do most of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Layout, Op, Tensor, channels_last, no, row_major, yes
from effc.ir.ops.reduce import Reduction
from effc.ir.rewrite import Answer, op
from effc.ir.types import LAYOUTS

from .analysis.traffic import estimate
from .base import Context, Pass, exact
from .common import missed, moved

RULE = "ChannelsLast"
TITLE = "conv2d(x) => conv2d(to_layout(x, channels_last)), kept until an op needs row-major memory"

# The result is laid out as x is, and each element is computed the same way in either layout.
KEEPS = (
    "max_pool2d", "avg_pool2d", "interpolate", "batch_norm", "group_norm", "pad", "slice", "copy",
    "softmax", "log_softmax", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
# Any layout may come in; the result is row-major.
READS = ("permute", "to_layout")


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Lay images out channels last through convolutions and everything between them.

    rewrite:
        y = relu(conv2d(x, w))
        -->
        y = to_layout(relu(conv2d(to_layout(x, channels_last), w)), row_major)

    layout: "channels_last", "row_major" (change nothing), or "auto": channels_last where that moves
    fewer bytes, a convolution in row-major memory being charged one more pass over its operands,
    and a 3x3 one of stride 1 what Winograd's transform saves, which wants channels together.
    Inputs and outputs of the graph keep the layout they were captured in.
    """

    name, numerics = "choose-layout", exact("rounding")
    layout: str = "auto"

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.layout == "row_major":
            ctx.note("row_major asked for: nothing is changed")
            return g
        convs = [n for n in g.nodes if n.name == "conv2d" and n not in g.constants]
        rows = [n for n in convs if n.x.tensor.layout == row_major]
        if not rows:
            ctx.note("no convolution reads row-major memory")
            return g
        laid = _Layouts(g)
        result = laid.run().live()
        made = (n for n in result.nodes if n.name == "to_layout" and n not in g.users)
        conversions = [n for n in made if not is_free(n)]
        answer = pays(rows, conversions) if self.layout == "auto" else yes
        if not answer:
            missed(ctx, RULE, TITLE, g, rows[0], answer)
            return g
        ctx.counted(RULE, TITLE, len(rows))
        ctx.note(f"{len(rows)} convolutions channels last, {len(conversions)} conversions")
        moved(laid.memo, rows)
        return result


def pays(convs: list[Any], conversions: list[Op]) -> Answer:
    saved = sum(estimate(c.x.tensor.nbytes + c.tensor.nbytes) + transform_saves(c) for c in convs)
    spent = sum(estimate(2 * c.tensor.nbytes) for c in conversions)
    if spent > saved:
        return no("conversions would move {:g} bytes, convolutions would save {:g}", spent, saved)
    return yes


def transform_saves(conv: Any) -> float:
    """Bytes that could be moved in the time Winograd's transform saves."""
    small = conv.w.tensor.shape[2:] != (3, 3) or conv.groups != 1
    if small or any(s != 1 for s in (*conv.stride, *conv.dilation)):
        return 0
    return estimate(conv.cost().flops) / OPERATIONS_A_BYTE / 2


OPERATIONS_A_BYTE = 10  # of one core: some 100 GFLOP/s beside 10 GB/s


def is_free(conversion: Any) -> bool:
    """Rows of channels seen as an image: the memory is in the wanted order already."""
    x = conversion.x
    last = conversion.layout == channels_last
    return last and x.name == "permute" and x.dims == (0, 3, 1, 2)


def layout_of(value: Op) -> Layout:
    return value.type.layout if isinstance(value.type, Tensor) else row_major


class _Layouts:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.memo: dict[Op, Op] = {i: i for i in graph.inputs}
        self.nodes: list[Op] = []
        self.converted: dict[tuple[Op, Layout], Op] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            constant = node in self.graph.constants
            made = self.rebuilt(node, {}) if constant else self.visit(node)
            self.memo[node] = made
            self.nodes.append(made)
        outputs = tuple(self.laid(o, layout_of(o), o) for o in self.graph.outputs)
        return Graph(self.graph.inputs, tuple(self.nodes), outputs, self.graph.name)

    def visit(self, node: Any) -> Op:
        if node.name == "conv2d":
            return self.rebuilt(node, {node.x: channels_last})
        if node.pointwise or node.name == "cat":
            images = [o for o in node.operands if self.is_image(o) and self.matches(o, node)]
            last = any(self.memo[o].tensor.layout == channels_last for o in images)
            return self.rebuilt(node, dict.fromkeys(images, channels_last if last else row_major))
        if node.name == "permute" and self.is_tokens(node):
            return self.tokens(node)
        if node.name in KEEPS or node.name in READS or isinstance(node, Reduction):
            return self.rebuilt(node, {})
        if node.name == "reshape" and node.x.tensor.shape[2:] == (1, 1):
            return self.rebuilt(node, {})  # one pixel: both layouts are the same memory
        return self.rebuilt(node, {o: o.tensor.layout for o in node.operands if self.is_image(o)})

    def is_image(self, value: Op) -> bool:
        return isinstance(value.type, Tensor) and value.type.rank == 4

    def matches(self, operand: Op, node: Op) -> bool:
        """Takes part in choosing the layout of the result."""
        return node.name == "cat" or operand.shape == node.shape

    def rebuilt(self, node: Op, wanted: dict[Op, Layout]) -> Op:
        """The node on operands in the wanted layouts; others as they come."""

        def operand(o: Op) -> Op:
            return self.laid(o, wanted[o], node) if o in wanted else self.memo[o]

        return node.map_operands(operand)

    def laid(self, old: Op, layout: Layout, reader: Op) -> Op:
        value = self.memo[old]
        if not isinstance(value.type, Tensor) or value.type.layout == layout:
            return value
        key = (value, layout)
        if key not in self.converted:
            value = self.image(value, reader) if layout == channels_last else value
            self.converted[key] = self.add(op.to_layout(value, LAYOUTS[layout.name]), reader)
        return self.converted[key]

    def add(self, made: Op, reader: Op) -> Op:
        self.nodes.append(made.from_(reader))
        return made

    # -------------------------------------------------------------- images as rows of channels

    def is_tokens(self, node: Any) -> bool:
        """permute(reshape(image, (n, c, h * w)), (0, 2, 1)) of an image that is channels last"""
        flat = node.x
        if node.dims != (0, 2, 1) or flat.name != "reshape" or not self.is_image(flat.x):
            return False
        return (
            flat.shape[:2] == flat.x.shape[:2] and self.memo[flat.x].tensor.layout == channels_last
        )

    def tokens(self, node: Any) -> Op:
        """reshape(permute(image, (0, 2, 3, 1)), (n, h * w, c)), which moves nothing"""
        rows = self.add(op.permute(self.memo[node.x.x], (0, 2, 3, 1)), node)
        return op.reshape(rows, node.shape).from_(node)

    def image(self, value: Any, reader: Op) -> Op:
        """reshape(permute(rows, (0, 2, 1)), image) => permute(reshape(rows), (0, 3, 1, 2))"""
        if value.name != "reshape" or value.x.name != "permute" or value.x.dims != (0, 2, 1):
            return value
        n, c, h, w = value.shape
        if value.x.shape[:2] != (n, c):
            return value
        rows = self.add(op.reshape(value.x.x, (n, h, w, c)), reader)
        return self.add(op.permute(rows, (0, 3, 1, 2)), reader)
