"""Targets triton and cuda on a real GPU: the zoo's small models, and a graph of every family.

    pytest -m gpu

Everywhere else these are skipped; the same kernels then run on the CPU, as target ptx-host.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import effc
from effc.backends.base import find_backend
from effc.examples.zoo import tensor_of
from effc.examples.zoo.library import LIBRARY
from effc.ir import interpret, parse

from .compressed import matrix, product, sparse

pytestmark = pytest.mark.gpu

FAMILIES = {
    "pointwise": """
def graph(x: DTYPE[N, 96], z: DTYPE[96]):
    a = add(x, z)
    b = gelu(a)
    c = mul(b, x)
    return c
""",
    "rows": """
def graph(x: DTYPE[N, 96], z: DTYPE[96]):
    a = add(x, z)
    b = softmax(a, 1)
    return b
""",
    "products": """
def graph(x: DTYPE[N, 96], z: DTYPE[96]):
    w = expand(z, (64, 96))
    t = permute(w, (1, 0))
    a = matmul(x, t)
    b = relu(a)
    return b
""",
    "movers": """
def graph(x: DTYPE[N, 96], z: DTYPE[96]):
    a = permute(x, (1, 0))
    b = reshape(a, (96*N,))
    c = exp(b)
    return c
""",
}
TOLERANCES = {"f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}


def gpu(name: str):
    """The target; `cuda` is NVIDIA's alone."""
    if name == "cuda" and torch.version.hip is not None:
        pytest.skip("needs an NVIDIA GPU")
    return find_backend(name)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_family_is_the_interpreter(name, family, dtype):
    graph = parse(FAMILIES[family].replace("DTYPE", dtype))
    bound = gpu(name).compile(graph).bind()
    of = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for rows in (1, 37, 64):
        inputs = [torch.randn(rows, 96, dtype=of), torch.randn(96, dtype=of) / 8]
        (want,) = interpret(graph, inputs)
        (got,) = bound([x.cuda() for x in inputs])
        t = TOLERANCES[dtype]
        torch.testing.assert_close(got.cpu(), want, rtol=t, atol=t)


CODED = {
    "weights": lambda: product(1, matrix("w", "uint4", (96, 256), 32, True), "f16"),
    "weights by tensor cores": lambda: product(
        40, matrix("w", "int3", (96, 256), 32, False), "f16"
    ),
    "planes, or lanes": lambda: product(
        3, matrix("w", "uint4", (96, 256), None, True), "f32", "int8"
    ),
    "integers": lambda: product(40, matrix("w", "i8", (96, 256), None, False), "f32", "int8"),
    "groups": lambda: product(2, sparse("w", "uint4", (96, 256), 16, 0.5), "f32", bias=True),
}


@pytest.mark.parametrize("case", CODED)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_products_of_codes_are_the_interpreter(name, case):
    graph = CODED[case]()
    inputs = [torch.randn(i.of.shape, dtype=i.of.dtype.torch) for i in graph.inputs]
    (want,) = interpret(graph, inputs)
    (got,) = gpu(name).compile(graph).bind()([x.cuda() for x in inputs])
    t = TOLERANCES[graph.outputs[0].dtype.name] * 10
    torch.testing.assert_close(got.cpu(), want, rtol=t, atol=t)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_model_is_eager(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, _, kwargs = LIBRARY[name].build()
    kwargs = {k: v.cuda() for k, v in kwargs.items()}
    model = model.cuda()
    with torch.no_grad():
        want = tensor_of(model(**kwargs))
        c = effc.compile(
            model, example_inputs=(), example_kwargs=kwargs, measure=False, target="triton"
        )
        got = tensor_of(c(**kwargs))
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_streams_do_not_mix():
    graph = parse("def graph(x: f32[N, 512]):\n    a = softmax(x, 1)\n    return a\n")
    bound = find_backend("triton").compile(graph).bind()
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [torch.randn(2048, 512, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    results = []
    for stream, x in zip(streams, inputs):
        with torch.cuda.stream(stream):
            results.append(bound([x])[0])
    torch.cuda.synchronize()
    for got, x in zip(results, inputs):
        torch.testing.assert_close(got, torch.softmax(x, 1))


def test_a_model_built_elsewhere_loads_and_compiles_nothing(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Softmax(-1)).eval()
    x = torch.randn(4, 32)
    with torch.no_grad():
        effc.compile(net, example_inputs=(x,), measure=False).save(tmp_path / "m.effc")
        target = find_backend("triton").machine()["targets"]
        effc.build(tmp_path / "m.effc", target, tmp_path / "gpu.effc")
        monkeypatch.setattr("effc.backends.gpu.backend.compile_kernels", None)
        got = effc.load(tmp_path / "gpu.effc")(x.cuda())
    torch.testing.assert_close(got.cpu(), net(x), rtol=1e-4, atol=1e-5)


LINEAR = """
def graph(x: bf16[N, 512], w: bf16[256, 512], b: bf16[256]):
    def body(x: bf16[N, 512], w: bf16[256, 512], b: bf16[256]):
        y0 = linear(x, w, b)
        y1 = relu(y0)
        return y1
    y0 = fused((x, w, b), body=body)
    y1 = softmax(y0, 1)
    y2 = permute(y1, (1, 0))
    y3 = softmax(y2, 1)
    return y3, y1
"""


def of_linear(rows: int) -> list[torch.Tensor]:
    shapes = ((rows, 512), (256, 512), (256,))
    return [torch.randn(*s, device="cuda").bfloat16() for s in shapes]


def close(got, graph, inputs) -> None:
    for g, want in zip(got, interpret(graph, [x.cpu() for x in inputs]), strict=True):
        torch.testing.assert_close(g.cpu(), want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_schedules_are_measured_and_the_times_kept(name, tmp_path, monkeypatch):
    monkeypatch.setattr("effc.backends.plan.tuning.cache_dir", lambda: tmp_path)
    graph, backend = parse(LINEAR), gpu(name)
    tuned = backend.compile(graph, {"tune": True})
    assert "ms measured" in tuned.launches[0].note
    assert backend.compile(graph).text == tuned.text
    for rows in (1, 300):
        inputs = of_linear(rows)
        close(tuned.bind()(inputs), graph, inputs)


def test_graphs_give_results_of_their_own():
    if torch.version.hip is not None:
        pytest.skip("needs an NVIDIA GPU")
    graph = parse(LINEAR)
    bound = find_backend("triton").compile(graph, {"cuda_graphs": True}).bind()
    held = []
    for rows in (64, 64, 64, 20, 20, 64, 64):
        inputs = of_linear(rows)
        held.append((bound(inputs), inputs))
    torch.cuda.synchronize()
    for got, inputs in held:
        close(got, graph, inputs)


def test_a_thread_that_has_not_used_the_device_runs_it():
    graph, inputs = parse(LINEAR), of_linear(33)
    bound = find_backend("triton").compile(graph).bind()
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(bound, inputs).result()
    torch.cuda.synchronize()
    close(got, graph, inputs)


def test_weights_on_the_cpu_are_moved():
    w = torch.randn(96)
    text = """
def graph(x: f32[N, 96]):
    w: f32[96] = weight("w", digest="")
    y = mul(x, w)
    return y
"""
    bound = find_backend("triton").compile(parse(text, weights={"w": w})).bind()
    x = torch.randn(5, 96, device="cuda")
    torch.testing.assert_close(bound([x])[0], x * w.cuda())
