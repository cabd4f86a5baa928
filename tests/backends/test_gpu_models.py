"""Whole models through ptx-host: every node claimed, results as eager's, launches counted."""

import pytest
import torch

import effc
from effc.backends import find_backend
from effc.backends.gpu import GPU
from effc.examples.rlfn.model import RLFN
from effc.examples.zoo.library import LIBRARY
from effc.gpu import gpu_plan, gpu_stages
from effc.ir import Rates
from effc.ir.types import Tensor
from effc.passes.pipelines import DEFAULT

NAMES = ("rlfn", "llama", "bert", "dit")


def compiled_for(model, arguments, target="ptx-host", **options):
    compiled = effc.compile(model, target=target, strict=True, **options)
    with torch.no_grad():
        result = compiled(**arguments)
    return effc.explain(compiled).records[0].executable, result


def close(got, want):
    """Relative L2 over all tensors in a nesting of results."""
    a, b = (
        torch.utils._pytree.tree_leaves(dict(v) if hasattr(v, "keys") else v) for v in (got, want)
    )
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
    assert pairs
    for x, y in pairs:
        assert x.shape == y.shape and x.dtype == y.dtype
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error < 2e-5, error


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_eager_with_every_node_claimed(name):
    model, _, arguments = LIBRARY[name].build()
    with torch.no_grad():
        want = model(**arguments)
    executable, got = compiled_for(model, arguments)
    assert not executable.fallbacks
    kinds = {launch.kind for launch in executable.launches}
    assert kinds <= {"kernel", "copy", "view"}
    close(got, want)


@pytest.mark.parametrize("name", ["llama", "rlfn"])
def test_one_compilation_serves_another_size(name):
    architecture = LIBRARY[name]
    model, _, arguments = architecture.build()
    compiled = torch.compile(model, backend="effc", options={"target": "ptx-host", "strict": True})
    architecture.mark_dynamic(arguments)
    with torch.no_grad():
        compiled(**arguments)
        for size in architecture.sizes:
            given = architecture.arguments(size)
            close(compiled(**given), model(**given))
    assert len(effc.explain(compiled).records) == 1
    torch._dynamo.reset()


# ------------------------------------------------------------------ launches


def launches(model, arguments):
    """Kernels that a forward pass starts; planned only, so at the sizes of real use."""
    compiled = effc.compile(
        model, example_inputs=(), example_kwargs=arguments, target="null", pipeline="",
        measure=False,
    )  # fmt: skip
    captured = effc.explain(compiled).records[0].stages[0].graph
    plan = gpu_plan(gpu_stages(captured, DEFAULT)[-1].graph)
    return sum(launch.kind in ("kernel", "copy") for launch in plan.launches)


def blocks(name, count):
    """The zoo's model at its larger size with so many blocks, and so many rows that no product
    takes its depth in parts, which is a second launch."""
    model, _, arguments = LIBRARY[name].build({"llama": 1024, "dit": 16}[name], scale="bench")
    if name == "llama":
        model.model.layers = model.model.layers[:count]
    else:
        model.transformer_blocks = model.transformer_blocks[:count]
    return model, arguments


@pytest.mark.parametrize(("name", "most"), [("llama", 8), ("dit", 10)])
def test_launches_of_one_block(name, most):
    two, one = (launches(*blocks(name, count)) for count in (2, 1))
    assert two - one <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_launches_of_rlfn(dtype):
    """Seven a block: three 3x3 convolutions, two 1x1 as one (in half, one with the 3x3 before it),
    the gate's small picture in two, and what reads it; and three beside the blocks."""
    model = RLFN(channels=52, blocks=6).eval().to(dtype)
    assert launches(model, {"x": torch.rand(1, 3, 180, 320, dtype=dtype)}) <= 45


def test_a_launch_is_worth_something_on_a_gpu_only():
    assert find_backend("cpu").rates == Rates()
    for name in ("ptx-host", "cuda-host", "triton"):
        rates = find_backend(name).rates
        assert rates == GPU.rates
        assert 5 < rates.operations < 40  # FLOP a byte of float32, of data sheets
        assert 1e6 < rates.launch < 1e8


def test_results_are_tensors_of_their_own():
    """Plans on the CPU runtime hand out memory that a second call does not write."""
    model, _, arguments = LIBRARY["bert"].build()
    compiled = effc.compile(model, target="ptx-host")
    with torch.no_grad():
        first = compiled(**arguments)[0]
        kept = first.clone()
        arguments["input_ids"] = arguments["input_ids"].flip(1)
        compiled(**arguments)
    assert torch.equal(first, kept)
    assert isinstance(effc.explain(compiled).records[0].executable.graph.outputs[0].type, Tensor)
