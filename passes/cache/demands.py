"""In which roles each value of a graph is needed, from its results back to its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from effc.ir import Graph, Input, No, Op, PassError, no, node_text
from effc.passes.analysis.roles import Demand, Positions, operand_demands

Plan = dict[Op, dict[Demand, list[Demand]]]  # value -> role it is needed in -> roles of operands


def demands(g: Graph, p: Positions, obstacles: Iterable[No] = ()) -> Plan:
    """Every role that the results need, in the order in which values are to be made.

    obstacles: those known already. Raises PassError with every obstacle.
    """
    wanted: dict[Op, dict[Demand, None]] = {n: {} for n in (*g.inputs, *g.nodes)}
    obstacles = list(obstacles)
    for position, output in enumerate(g.outputs):
        if why := _of_output(p, output):
            obstacles.append(no("result {}: {}", position, why, at=output))
        else:
            wanted[output][p.demand(output)] = None
    plan: Plan = {}
    for node in reversed(g.nodes):
        if node.random:
            wanted[node][p.demand(node)] = None
        plan[node] = {}
        for demand in _in_order(p, node, wanted[node]):
            computed = now(demand) if is_kept(p, node, demand) else demand
            needs = operand_demands(p, node, computed)
            if isinstance(needs, No):
                obstacles.append(needs)  # and on, for those before it
                needs = [
                    d if sum(r is not None for r in d) < 2 else None
                    for d in map(p.demand, node.operands)
                ]
            else:
                plan[node][demand] = needs
            for operand, need in zip(node.operands, needs, strict=True):
                if need is not None:
                    wanted[operand][need] = None
    for given in g.inputs:
        plan[given] = {demand: [] for demand in wanted[given]}
        if any(isinstance(r, int) and r > 0 for demand in wanted[given] for r in demand):
            obstacles.append(no("positions after the one that is computed are read", at=given))
    if obstacles:
        raise _refusal(g, obstacles)
    return plan


def _of_output(p: Positions, output: Op) -> str:
    over = [
        s for s, is_over in zip(getattr(output.type, "shape", ()), p.in_shape(output)) if is_over
    ]
    if len(over) > 1:
        return f"{output.type} has {len(over)} dimensions over positions"
    if over and not p.multiple(over[0]):
        return f"{output.type} is over {over[0]}, not {p.size} positions"
    return ""


def earlier(demand: Demand) -> bool:
    """Whether rows before the new ones are asked for."""
    return any(isinstance(role, int) and role < 0 for role in demand)


def is_kept(p: Positions, node: Op, demand: Demand) -> bool:
    """Whether rows of earlier positions come out of a state that holds the value at every one.

    Earlier rows are asked of operands as long as the op can: inputs have least to keep, and what
    attention gave for an earlier position is not computed again.
    """
    if not earlier(demand):
        return False
    return isinstance(node, Input) or isinstance(operand_demands(p, node, demand), No)


def now(demand: Demand) -> Demand:
    """The new rows instead of earlier ones."""
    return tuple(0 if isinstance(role, int) and role < 0 else role for role in demand)


def _in_order(p: Positions, node: Op, wanted: dict[Demand, None]) -> dict[Demand, None]:
    """The demands on a node; first what is to be kept for others of them."""
    return {now(demand): None for demand in wanted if is_kept(p, node, demand)} | wanted


def _refusal(g: Graph, obstacles: Sequence[No]) -> PassError:
    rows: dict[str, None] = {}
    for o in obstacles:
        assert o.at is not None
        shown = node_text(g, o.at).partition("  #")[0]
        where = f"\n    at    {o.at.where}" if o.at.where else ""
        rows[f"  {shown}{where}\n    why   {o.reason}"] = None
    first = obstacles[0]
    assert first.at is not None
    return PassError(
        f"{g.name} cannot be computed token by token: {len(rows)} obstacles", why=first.reason,
        where=first.at.where, context="\n".join(rows),
    )  # fmt: skip


__all__ = ["Plan", "demands", "is_kept", "now"]
