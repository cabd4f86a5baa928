"""Generated kernels of whole models under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess

import pytest
import torch

from effc.backends import find_backend
from effc.codegen.toolchain import Toolchain, find_toolchain
from effc.examples.zoo.library import LIBRARY
from effc.ir import parse

from . import replay
from .amx import pretend

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module", autouse=True)
def sanitizers(tmp_path_factory) -> None:
    found = find_toolchain()
    if not isinstance(found, Toolchain):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }")
    command = [*found.command, *FLAGS, "-fopenmp", folder / "probe.cpp", "-o", folder / "probe"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers here")


def clean(recorder: replay.Recorder, folder) -> int:
    """Run every plan made; the number of calls."""
    assert recorder.made
    total = 0
    for i, (frame, inputs) in enumerate(recorder.made):
        if not frame.plan.kernels:
            continue
        replay.write(frame, inputs, folder / str(i))
        done = replay.run(folder / str(i), *FLAGS)
        assert done.returncode == 0, done.stderr[:4000]
        total += int(done.stdout.split()[0])
    return total


@pytest.mark.parametrize("name", ["llama", "sd-unet", "rlfn"])
def test_models(name, monkeypatch, tmp_path) -> None:
    recorder = replay.Recorder(monkeypatch)
    model, args, kwargs = LIBRARY[name].build()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="effc")(*args, **kwargs)
    assert clean(recorder, tmp_path) > 10


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_products_on_tiles(precision, monkeypatch, tmp_path) -> None:
    """No size is one of whole tiles; bands of lines, strips, and lines apart among them."""
    sizes = {"w": (53, 37, 3, 2), "v": (7, 37, 1, 3), "u": (5, 3, 3, 3), "l": (23, 37)}
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    weights["h"] = torch.randn(19, 70).bfloat16()
    graph = parse(
        """
def graph(x: f32[2, 37, 9, 301] @ channels_last, z: f32[2, 3, 21, 40] @ channels_last, q: f32[2, 213, 37], k: f32[2, 199, 37], h: bf16[45, 70]):
    w0: f32[53, 37, 3, 2] = weight("w", digest="")
    w1: f32[7, 37, 1, 3] = weight("v", digest="")
    w2: f32[5, 3, 3, 3] = weight("u", digest="")
    w3: bf16[19, 70] = weight("h", digest="")
    w4: f32[23, 37] = weight("l", digest="")
    y0 = conv2d(x, w0, stride=(1, 2), padding=(1, 1), dilation=(2, 1))
    y1 = conv2d(x, w1, padding=(0, 24), dilation=(1, 24))
    y2 = conv2d(z, w2, padding=(1, 1))
    y3 = linear(h, w3)
    y4 = attention(q, k, k)
    y5 = linear(q, w4)
    return y0, y1, y2, y3, y4, y5
""",
        weights=weights,
    )
    pretend(monkeypatch)
    recorder = replay.Recorder(monkeypatch)
    executable = find_backend("cpu").compile(graph, {"float32_matmul_precision": precision})
    assert all(e.note.startswith("bf16") for e in executable.launches)
    executable.bind()([torch.randn(i.of.shape).to(i.of.dtype.torch) for i in graph.inputs])
    assert clean(recorder, tmp_path) == 6


def test_results_past_the_caches(monkeypatch, tmp_path) -> None:
    for module in ("pointwise", "rows"):
        monkeypatch.setattr(f"effc.backends.cpu.{module}.past_caches", lambda: 1)
    inputs, lines, results = [], [], []
    for n, dtype in enumerate(("f32", "f16", "bf16")):
        inputs += [f"x{n}: {dtype}[13, 2083]", f"w{n}: {dtype}[2083]"]
        a, b, c = mine = [f"y{3 * n + i}" for i in range(3)]
        lines += [f"{a} = layer_norm(x{n}, w{n}, w{n})", f"{b} = softmax(x{n}, dim=1)"]
        lines.append(f"{c} = add(x{n}, w{n})")
        results += mine
    lines.append(f"return {', '.join(results)}")
    graph = parse(f"def graph({', '.join(inputs)}):\n    " + "\n    ".join(lines))
    recorder = replay.Recorder(monkeypatch)
    given = [torch.randn(i.of.shape).to(i.of.dtype.torch) for i in graph.inputs]
    find_backend("cpu").compile(graph).bind()(given)
    assert clean(recorder, tmp_path) == 9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_step_of_decoding(dtype, monkeypatch, tmp_path) -> None:
    """Few rows and odd sizes; a cache that is full, and read by as many queries as a step has and by
    those of a prompt."""
    graph = parse(
        """
def graph(x: T[3, 37], w: T[53, 37], v: T[37, 53], q: T[1, 6, 1, 11], r: T[1, 6, 29, 11], k: State[T[1, 2, 71, 11]], new: T[1, 2, 1, 11], last: i64[()], early: i64[()]):
    y0 = linear(x, w)
    y1 = matmul(x, v)
    k0 = update(k, new, last, dim=2)
    y2 = attention(q, k0, k0, causal=True, gqa=True, past=last)
    y3 = attention(r, k0, k0, causal=True, gqa=True, past=early)
    return y0, y1, y2, y3, k0
""".replace("T[", f"{dtype}[")
    )
    monkeypatch.setattr("effc.backends.cpu.products._instructions", lambda dtype: False)
    recorder = replay.Recorder(monkeypatch)
    inputs = [torch.randn(i.of.shape).to(i.of.dtype.torch) for i in graph.inputs]
    inputs[-2:] = torch.tensor(70), torch.tensor(42)
    find_backend("cpu").compile(graph).bind()(inputs)
    assert clean(recorder, tmp_path) == 5


def test_a_write_behind_the_end_is_seen(monkeypatch, tmp_path) -> None:
    """The check can fail: a kernel told of one row too many."""
    graph = parse(
        """
def graph(x: f32[7, 20], w: f32[33, 20]):
    y0 = linear(x, w)
    y1 = exp(y0)
    return y1,
"""
    )
    recorder = replay.Recorder(monkeypatch)
    find_backend("cpu").compile(graph).bind()([torch.randn(7, 20), torch.randn(33, 20)])
    assert clean(recorder, tmp_path / "right") == 2
    ((frame, inputs),) = recorder.made
    replay.write(frame, inputs, tmp_path / "wrong")
    main = tmp_path / "wrong" / "main.cpp"
    text = main.read_text()
    assert "INT64_C(7), INT64_C(33)" in text
    main.write_text(text.replace("INT64_C(7), INT64_C(33)", "INT64_C(8), INT64_C(33)", 1))
    done = replay.run(tmp_path / "wrong", *FLAGS)
    assert done.returncode and "heap-buffer-overflow" in done.stderr
