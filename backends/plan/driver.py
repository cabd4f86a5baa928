"""The Python of one call, written out for a plan: no loops, no look-ups that could be made before.

At small sizes the time of a call is the time of this code. It is compiled once for a plan and given
the numbers, addresses and steps of each frame. The text is part of what a plan can show.
"""

from __future__ import annotations

from types import CodeType

from effc.ir import Input, Number, row_major

from .memory import Root
from .plan import Plan
from .steps import HostCall


def write_driver(plan: Plan, device: str = "cpu") -> str:
    """Source of `run(inputs)`; the names it uses are those that a Frame defines."""
    here = "x{}.is_cpu" if device == "cpu" else "x{}.is_cuda"
    read = {slot for s in plan.steps if isinstance(s, HostCall) for slot in s.reads}
    kept = read | set(plan.outputs)
    lines, local, used = ["def run(inputs):"], {}, []
    states: list[int] = []  # places among the inputs
    names = ", ".join(f"x{i}" for i in range(len(plan.inputs)))
    if plan.inputs:
        lines.append(f"    {names}{',' if len(plan.inputs) == 1 else ''} = inputs")
    for i, (node, root) in enumerate(zip(plan.graph.inputs, plan.inputs)):
        slot = root if isinstance(root, int) else root.slot
        if slot in plan.outputs:
            local[slot] = f"x{i}"
        if not isinstance(node.of, Number):
            check = f"x{i}.dtype is not dtype{i} or not {here.format(i)}"
            lines.append(f"    if {check}: refuse(inputs)")
        name = f"x{i}"
        if isinstance(node, Input) and node.state:
            assert isinstance(root, Root)
            name = f"s{i}"
            states.append(i)
            lines += _state(f"x{i}", name, f"p{i}", root, plan.alignment)
        elif isinstance(root, Root) and root.number >= 0:
            lines += _publish(f"x{i}", root, plan.slots + 1 + i, plan.alignment)
        if slot in read:
            lines.append(f"    values[{slot}] = {name}")
            used.append(slot)
    if states:
        places = [i for i, root in enumerate(plan.inputs) if isinstance(root, Root)]
        distinct = ", ".join(f"p{i}" if i in states else f"x{i}.data_ptr()" for i in places)
        lines.append(f"    if len({{{distinct}}}) < {len(places)}: overlap(inputs)")
    for root in plan.output_roots:
        name = local[root.slot] = f"o{root.slot}"
        store = f" = values[{root.slot}]" if root.slot in read else ""
        lines.append(f"    {name}{store} = empty(shape{root.slot}, strides{root.slot}, "
                     f"dtype_{root.slot})")  # fmt: skip
        lines.append(f"    table[{root.number}] = {name}.data_ptr()")
        used += [root.slot] if root.slot in read else []
    for at, group in plan.segments():
        if isinstance(group, HostCall):
            lines.append(f"    step{at}()")
        else:
            lines.append(f"    native(data{at}, {len(group)}, addresses, threads())")
            if any(ref.root.kind == "error" for call in group for ref in call.refs):
                lines.append("    if error[0]: out_of_range()")
        lines += [f"    values[{slot}] = None" for slot in plan.gone_after(at, group)]
    lines += [f"    if s{i} is not x{i}: x{i}.copy_(s{i})" for i in states]
    results = ", ".join(local.get(slot, f"values[{slot}]") for slot in plan.outputs)
    lines.append(f"    results = ({results}{',' if plan.outputs else ''})")
    shown = {s for s, root in plan.shown_in.items() if root.kind != "const" and s not in local}
    used += shown & kept
    lines += [f"    values[{slot}] = None" for slot in sorted(set(used))]
    lines.append("    return results")
    return "\n".join(lines) + "\n"


def _publish(name: str, root: Root, keep: int, alignment: int) -> list[str]:
    """Tell kernels where a tensor lies, packed first where it does not lie as they walk it."""
    fits = _fits(name, root, alignment)
    if not root.shape:  # strides cannot tell a negated view apart
        return [
            f"    p = values[{keep}] = pack({name}, ())",
            f"    table[{root.number}] = p.data_ptr()",
        ]
    return [
        f"    if {fits}: table[{root.number}] = {name}.data_ptr()",
        "    else:",
        f"        p = values[{keep}] = pack({name}, strides{root.slot})",
        f"        table[{root.number}] = p.data_ptr()",
    ]


def _state(name: str, held: str, place: str, root: Root, alignment: int) -> list[str]:
    """The same for a state, which is `held` then and copied back at the end where it was packed.

    place: the address of what was given.
    """
    fits = _fits(name, root, alignment, place) if root.shape else f"not {name}.is_neg()"
    publish = f"    table[{root.number}] = " if root.number >= 0 else ""
    return [
        f"    {held}, {place} = {name}, {name}.data_ptr()",
        *([f"{publish}{place}"] if publish else []),
        f"    if not ({fits}):",
        f"        {held} = pack({name}, strides{root.slot})",
        *([f"    {publish}{held}.data_ptr()"] if publish else []),
    ]


def _fits(name: str, root: Root, alignment: int, place: str = "") -> str:
    """Whether a tensor lies as kernels walk it; asked in the quickest way that there is."""
    plain = root.node is not None and root.strides == row_major.strides(root.shape)
    fits = f"{name}.is_contiguous()" if plain else f"{name}.stride() == strides{root.slot}"
    return fits + (
        f" and not {place or f'{name}.data_ptr()'} % {alignment}" if alignment > 1 else ""
    )


def compile_driver(plan: Plan, device: str = "cpu") -> CodeType:
    return compile(write_driver(plan, device), f"<plan of {plan.graph.name}>", "exec")
