"""Random graphs: the CPU's plan, bare and after the default passes, gives what the interpreter does.

EFFC_HYPOTHESIS=full runs a thousand graphs, EFFC_EXAMPLES=n runs n: each builds its own kernels.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.codegen.toolchain import find_toolchain
from effc.ir import interpret, parse
from effc.passes.base import Pipeline
from effc.passes.pipelines import DEFAULT
from effc.pipeline import run_pipeline
from tests.ir.strategies import assert_close, graphs, inputs_for, tolerances

pytestmark = pytest.mark.skipif(not find_toolchain(), reason="needs a C++ compiler")

QUICK = 12
EXAMPLES = 1000 if os.environ.get("EFFC_HYPOTHESIS") == "full" else QUICK
EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", EXAMPLES))
graphs_each = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == QUICK, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.timeout(3600)
@graphs_each
@given(graphs(), st.integers(0, 99))
def test_the_plan_is_the_interpreter(graph, seed):
    inputs = inputs_for(graph, seed)
    bound = find_backend("cpu").compile(graph).bind()
    want = interpret(graph, inputs)
    assert_close(bound(inputs), want, tolerances(graph, inputs))


@pytest.mark.timeout(3600)
@graphs_each
@given(graphs(), st.integers(0, 99))
def test_the_default_passes_and_the_plan_are_the_interpreter(graph, seed):
    inputs = inputs_for(graph, seed)
    backend = find_backend("cpu")
    last = run_pipeline(graph, Pipeline.parse(DEFAULT), supports=backend.supports)[-1].graph
    bound = backend.compile(last, {"captured": graph}).bind()
    want = interpret(graph, inputs)
    assert_close(bound(inputs), want, tolerances(graph, inputs, slack=64))


def test_attention_that_is_causal_beside_a_mask():
    """Found by the thousand graphs: ATen's routine refuses the pair."""
    graph = parse("""
def graph(q: f32[2, 3, 5, 8], keep: bool[5, 5]):
    y0 = attention(q, q, q, keep, causal=True)
    return y0,
""")
    q, keep = torch.randn(2, 3, 5, 8), torch.rand(5, 5) > 0.3
    keep.fill_diagonal_(True)
    (got,) = find_backend("cpu").compile(graph).bind()([q, keep])
    torch.testing.assert_close(got, interpret(graph, [q, keep])[0])
