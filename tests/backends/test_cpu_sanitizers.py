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
