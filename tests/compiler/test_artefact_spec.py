"""Nested arguments as text: what torch writes comes back, and nothing in it makes Python import."""

import collections
import enum
import json

import pytest
import torch
from torch.utils import _pytree as pytree

from effc.artefact_spec import read_spec, write_spec
from effc.ir import ArtefactError


class Key(enum.Enum):
    A = 1


@pytest.mark.parametrize(
    "value",
    [
        1,
        (1, [2, (3,)], {}),
        {"b": 1, "a": {"x": None, 3: [2]}},
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, a=1),
        collections.deque([1, 2], maxlen=3),
        torch.Size((1, 2)),
    ],
    ids=repr,
)
def test_specs_come_back(value):
    _, spec = pytree.tree_flatten(value)
    assert read_spec(write_spec(spec, "takes")) == spec


class Own(dict):
    """A factory that a file cannot name."""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({Key.A: 1}, "an enum"),
        (collections.defaultdict(Own, a=1), "factory"),
        ({(1, 2): 1}, "keys"),
        ({1.5: 1, b"x": 2}, ""),
    ],
    ids=["enum", "factory", "tuple", "bytes"],
)
def test_what_is_not_written(value, said):
    _, spec = pytree.tree_flatten(value)
    with pytest.raises(ArtefactError, match="cannot be saved") as caught:
        write_spec(spec, "returns")
    assert said in str(caught.value)


def text(kind, context):
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


ENUM = {"__enum__": True, "fqn": "antigravity:Key", "name": "A"}


@pytest.mark.parametrize(
    ("kind", "context", "said"),
    [
        ("builtins.dict", json.dumps([ENUM]), "an enum"),
        ("builtins.dict", json.dumps([{"deep": [ENUM]}]), "an enum"),
        ("builtins.dict", json.dumps([ENUM]).replace("__e", "\\u005f_e"), "an enum"),
        ("collections.defaultdict",
         {"default_factory_module": "antigravity", "default_factory_name": "Key",
          "dict_context": ["a"]}, "antigravity.Key"),
        ("collections.defaultdict",
         {"default_factory_module": "builtins", "default_factory_name": "breakpoint",
          "dict_context": ["a"]}, "builtins.breakpoint"),
        ("some.library.Output", "[]", "import some.library before loading"),
    ],
)  # fmt: skip
def test_text_that_would_import_is_refused(kind, context, said):
    with pytest.raises(ArtefactError) as caught:
        read_spec(text(kind, context))
    assert said in str(caught.value)


@pytest.mark.parametrize("bad", ["", "[]", "[1, {}]", "[1, []]", "[9, 1]", "{}"])
def test_other_text(bad):
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_spec(bad)
