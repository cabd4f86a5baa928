"""Parts of a graph that only say how to run it: gradient modes, checkpoints, autocast, checks.

Before the export regions are inlined, or left out where they change nothing in inference;
autocast's casts become nodes. The graph module a caller passes is never changed.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence

import torch
from torch._ops import HigherOrderOperator

from effc.aliasing import tensors_of

aten = torch.ops.aten

_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
}
_DROPOUTS = {torch.nn.functional.dropout, torch.dropout, aten.dropout.default}
# operator: where its sub-graph and the first operand of it stand among the arguments
_REGIONS = {
    "wrap": (0, 1),
    "tag_activation_checkpoint": (0, 1),
    "wrap_activation_checkpoint": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
}


def _region(node: torch.fx.Node) -> str | None:
    """The name of the region a node calls."""
    name = node.target.name() if isinstance(node.target, HigherOrderOperator) else None
    return name if name in _REGIONS else None


def without_regions(gm: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, bool]:
    """The graph with its regions inlined, and whether autocast is on anywhere in it."""
    devices = _devices(gm)
    casts = any(
        torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices
    )
    special = {_ENTER, torch._assert_async, *_SWITCHES, *_DROPOUTS}
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    if not any(node.target in special or _region(node) for node in calls):
        return gm, casts
    inliner = _Inliner(devices, casts)
    inliner.graph.output(inliner.inline(gm))
    inlined = torch.fx.GraphModule(inliner.attributes, inliner.graph)
    inlined.meta = gm.meta
    return inlined, inliner.casts


class _Inliner:
    """Copies a graph, leaving the original as it is for a caller that has to fall back on it."""

    def __init__(self, devices: set[str], casts: bool) -> None:
        self.graph = torch.fx.Graph()
        self.attributes: dict[str, object] = {}
        self.devices, self.casts, self.regions = devices, casts, 0

    def inline(
        self, gm: torch.fx.GraphModule, operands: Sequence | None = None, prefix: str = ""
    ) -> object:
        """Copy the nodes of `gm` and return what stands for its output."""
        env: dict[torch.fx.Node, object] = {}
        arguments = iter(operands or ())
        for node in gm.graph.nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder" and operands is not None:
                env[node] = next(arguments)
            elif node.op in ("get_attr", "call_module"):
                env[node] = self._attribute(node, operator.attrgetter(node.target)(gm), prefix, env)
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            else:
                env[node] = self.graph.node_copy(node, env.__getitem__)
        raise AssertionError("a graph has an output")

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, object]) -> object:
        args = torch.fx.map_arg(node.args, env.__getitem__)
        if node.target in _SWITCHES or (node.target is _EXIT and args[0] is None):
            return None
        if node.target is _ENTER and not self._matters(*args[:3]):
            return None
        if node.target in _DROPOUTS and _inactive(*node.args[1:3], **node.kwargs):
            return args[0]
        if region := _region(node):
            return self._inlined(region, args)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        copy = self.graph.node_copy(node, env.__getitem__)
        if node.target is torch._assert_async and len(args) == 1:
            copy.args = (*args, "assertion failed")  # the overload without a text is taken for dead
        return copy

    def _attribute(self, node: torch.fx.Node, value: object, prefix: str, env: dict) -> object:
        if node.users and all(map(_region, node.users)):
            return value  # a sub-graph, inlined where it is called
        copy = self.graph.node_copy(node, env.__getitem__)
        copy.target = prefix + node.target
        self.attributes[copy.target] = value
        return copy

    def _inlined(self, name: str, args: tuple) -> object:
        at, first = _REGIONS[name]
        enter = None
        if name == "wrap_with_autocast" and self._matters(*args[:3]):
            enter = self.graph.call_function(_ENTER, args[:4])
        self.regions += 1
        results = self.inline(args[at], args[first:], f"region_{self.regions}_")
        if enter is not None:
            self.graph.call_function(_EXIT, (enter,))
        return results

    def _matters(self, device: str, dtype: torch.dtype | None, enabled: bool) -> bool:
        """An autocast region matters if it can cast, or can stop one around it from casting."""
        if device not in self.devices:
            return False
        self.casts = self.casts or enabled
        return self.casts


def _inactive(
    p: object = 0.5, training: object = True, *, train: object = True, **_: object
) -> bool:
    """True if such a dropout returns its argument itself; traced whole it would hide that alias."""
    return p == 0 or training is False or train is False


def _devices(gm: torch.fx.GraphModule) -> set[str]:
    return {value.device.type for node in gm.graph.nodes for value in tensors_of(node)}


@contextlib.contextmanager
def explicit_casts(gm: torch.fx.GraphModule) -> Iterator[None]:
    """Let autocast insert its casts while tracing; operators it knows stay whole, others do not.

    Before dispatch autocast has not acted yet, so the graph is taken after it, keeping those
    composite operators that autocast handles as one, or that hold nothing it handles.
    """
    from torch.export import exported_program as private

    devices = _devices(gm)
    keys = [f"Autocast{device.upper()}" for device in devices if device in ("cpu", "cuda", "xpu")]
    handled = torch._C._dispatch_has_kernel_for_dispatch_key
    whole = [
        op
        for op in private._collect_all_valid_cia_ops()
        if op in _NOTHING_TO_CAST or all(handled(op.name(), key) for key in keys)
    ]
    with contextlib.ExitStack() as stack:
        for device in devices:
            if torch.amp.is_autocast_available(device):
                enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
        keep = dict.fromkeys(whole, private._special_op_to_preserve_cia)
        stack.enter_context(private._override_composite_implicit_decomp(keep))
        yield


_NOTHING_TO_CAST = {
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.max_pool2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
}


_CHECKS = {
    torch._C._set_grad_enabled,
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def drop_checks(graph: torch.fx.Graph) -> None:
    """Drop gradient switches and checks of what is static or already guarded (not the user's)."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=True))
