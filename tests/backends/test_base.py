"""The registry, options, launches, and the two backends that exist everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from effc.backends import Backend, Options, backend_names, base, find_backend, register_backend
from effc.ir import EffcError, OptionError, no, parse

GRAPH = """
def graph(x: f32[N, 4]):
    w0: f32[4, 4] = weight("w", digest="")
    y0 = linear(x, w0)
    y1 = relu(y0)
    return y1,
"""


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(OptionError) as e:
        find_backend("cpuu")
    assert str(e.value) == "unknown backend 'cpuu'\n  fix   did you mean 'cpu'?"


def test_one_instance_serves_all() -> None:
    assert find_backend("cpu") is find_backend("cpu")
    assert {"cpu", "null", "reference"} <= set(backend_names())


def test_a_backend_of_another_package_registers(monkeypatch) -> None:
    monkeypatch.setattr(base._registry, "classes", {})
    monkeypatch.setattr(base._registry, "made", {})

    @register_backend
    class Mine(Backend):
        name = "mine"

        def supports(self, node):
            return no("mine takes nothing", at=node)

        def compile(self, graph, options=None):
            raise NotImplementedError

    assert isinstance(find_backend("mine"), Mine)
    assert "mine" in backend_names()


def test_a_broken_plugin_says_what_to_do(monkeypatch) -> None:
    class Entry:
        name, value, dist = "broken", "nowhere:Backend", None

        def load(self):
            raise ImportError("No module named 'nowhere'")

    monkeypatch.setattr(base, "_plugins", lambda: {"broken": Entry()})
    with pytest.raises(EffcError) as e:
        find_backend("broken")
    assert "(nowhere:Backend) cannot be imported" in str(e.value)
    assert e.value.fix == "repair or uninstall broken"


def test_options_come_from_mappings_and_from_objects() -> None:
    @dataclass
    class Outer:
        threads: int = 3
        pipeline: str = "not ours"

    assert Options.of(None) == Options()
    assert Options.of({"threads": 2}).threads == 2
    assert Options.of(Outer()).threads == 3
    with pytest.raises(OptionError) as e:
        Options.of({"thread": 2})
    assert e.value.fix == "did you mean 'threads'?"


def test_reference_interprets_and_takes_weights() -> None:
    bound = find_backend("reference").compile(parse(GRAPH)).bind({"w": torch.eye(4)})
    x = torch.randn(3, 4)
    assert torch.equal(bound([x])[0], x.relu())


def test_null_plans_and_never_runs(golden) -> None:
    executable = find_backend("null").compile(parse(GRAPH))
    assert executable.text == golden
    assert all("EFFC_EXPORT" in source for source in executable.kernels.values())
    with pytest.raises(EffcError, match="does not run it"):
        executable.bind()
