"""explain() finds what belongs to an object: through graph breaks, recompilations and sharing."""

import pytest
import torch
from torch import nn

import effc
from effc.dynamo import _name, _recompile_cause
from effc.explanation import explain, graph_break, records_of
from effc.ir import InputError
from effc.record import Record


class Returned:
    """What a backend gives Dynamo; effc's own carries its record likewise."""

    def __init__(self, gm, record):
        self.gm, self._effc_record = gm, record

    def __call__(self, *args):
        return self.gm.forward(*args)


def backend(gm, example_inputs):
    record = Record(_name())
    record.graph_break, record.recompile_cause = graph_break(gm), _recompile_cause()
    return Returned(gm, record)


def compiled(target):
    return torch.compile(target, backend=backend)


@torch._dynamo.disable
def opaque(x):
    return x


def helper(x):
    return opaque(x * 2).relu()


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).relu()


class Broken(Whole):
    def forward(self, x):
        x = self.fc(x)
        torch._dynamo.graph_break()
        return helper(x) + 1


def line(function):
    return function.__code__.co_firstlineno


def names(target):
    return [r.name for r in records_of(target)[0]]


def test_one_graph():
    fast = compiled(Whole())
    fast(torch.ones(3, 4))
    explanation = explain(fast)
    assert (explanation.name, len(explanation.reports)) == ("Whole", 1)
    assert explanation.breaks == [] and explanation.notes == []
    assert explanation.records[0].name == explanation.reports[0].name == "graph 0/0"


def test_function():
    def double(x):
        return x * 2

    fast = compiled(double)
    fast(torch.ones(3))
    assert names(fast) == ["graph 0/0"]
    assert explain(fast).name.endswith("double")


def test_graph_breaks_are_followed_into_code_that_is_not_inlined():
    fast = compiled(Broken())
    fast(torch.ones(3, 4))
    explanation = explain(fast)
    assert len(explanation.reports) == 4  # before the break, two halves of helper, after it
    first, second = explanation.breaks
    assert first.where == f"test_explanation.py:{line(Broken.forward) + 2}"
    assert "graph_break" in first.reason
    assert second.where == f"test_explanation.py:{line(helper) + 1}"
    assert "opaque" in second.reason and "0x" not in second.reason
    assert str(explanation).startswith("Broken: 4 graphs, capture stopped 2 times\n")
    assert str(explanation).count("\nEnds early\n") == 2


def test_recompilation_names_its_cause():
    fast = compiled(Whole())
    for n in (3, 5):
        fast(torch.ones(n, 4))
    first, second = explain(fast).reports
    assert first.recompile_cause == ""
    assert "tensor 'x' size mismatch at index 0. expected 3, actual 5" in second.recompile_cause


def test_each_object_has_its_own_graphs():
    a, b = Whole(), nn.Sequential(Whole(), nn.Tanh())
    fast_a, fast_b = compiled(a), compiled(b)
    fast_a(torch.ones(3, 4))
    fast_b(torch.ones(3, 4))
    assert names(fast_a) == ["graph 0/0"]
    assert len(names(fast_b)) == 1 and names(fast_b) != names(fast_a)


def test_code_shared_with_another_object_is_found_and_said():
    first, second = compiled(Broken()), compiled(Broken())
    first(torch.ones(3, 4))
    second(torch.ones(3, 4))
    records, notes = records_of(second)
    assert records and {id(r) for r in records} <= {id(r) for r in records_of(first)[0]}
    assert notes == ["shares code that was compiled for another module of the same class"]


def test_compiled_parts_of_a_model():
    model = nn.Sequential(compiled(nn.Tanh()), nn.ReLU())
    model(torch.ones(3))
    assert len(names(model)) == 1
    in_place = Whole()
    in_place.compile(backend=backend)
    in_place(torch.ones(3, 4))
    assert len(names(in_place)) == 1


def test_what_was_never_compiled():
    with pytest.raises(InputError, match="Whole is not compiled") as e:
        explain(Whole())
    assert 'torch.compile(model, backend="effc")' in e.value.fix
    with pytest.raises(InputError, match="int is not compiled"):
        explain(3)


def test_what_another_backend_compiled():
    fast = torch.compile(Whole(), backend="eager")
    fast(torch.ones(3, 4))
    with pytest.raises(InputError, match="Whole is compiled by eager, not by effc"):
        explain(fast)


def test_what_was_not_called_yet():
    for fast in (torch.compile(Whole(), backend="effc"), effc.compile(Whole())):
        with pytest.raises(InputError, match="Whole has no compiled graph yet") as e:
            explain(fast)
        assert e.value.fix == "call it once first"


def test_after_dynamo_was_reset():
    fast = torch.compile(Whole(), backend="effc", options={"target": "reference"})
    with torch.no_grad():
        fast(torch.ones(3, 4))
        assert len(explain(fast).reports) == 1
        torch._dynamo.reset()
        with pytest.raises(InputError, match="no compiled graph yet"):
            explain(fast)
        fast(torch.ones(3, 4))
    assert len(explain(fast).reports) == 1


def test_records_that_an_object_carries():
    model = nn.Linear(4, 4)
    model._effc_records = [Record("Linear", "simplify")]
    assert [r.name for r in explain(model).reports] == ["Linear"]


def test_the_package_offers_it_under_one_name():
    model = nn.Linear(4, 4)
    model._effc_records = [Record("Linear")]
    assert len(effc.explain(model).reports) == 1
