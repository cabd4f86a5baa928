"""How arguments and results are nested, as JSON: torch's own form of pytree specs, checked.

torch's reader imports whatever module the text names, for enums and default factories. Text from a
file must not say what is imported, so such specs are refused, and so are types that nothing in this
process has registered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree

from effc.ir import ArtefactError

__all__ = ["read_spec", "write_spec"]

FACTORIES = ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")


def write_spec(spec: pytree.TreeSpec, verb: str) -> str:
    """A spec as text. Raises ArtefactError where the text would not read back as the same."""
    what = f"a model that {verb} {_named(spec)} cannot be saved"
    try:
        made = pytree.treespec_dumps(spec)
        same = read_spec(made) == spec
    except ArtefactError as e:
        raise ArtefactError(what, why=e.why, fix=e.fix) from e
    except (NotImplementedError, TypeError, ValueError, AttributeError) as e:
        raise ArtefactError(
            what, why=str(e), fix="register it with a serialized_type_name "
            "(torch.utils._pytree.register_pytree_node), or use tuples, lists and dicts",
        ) from e  # fmt: skip
    if not same:
        why = "its keys do not survive JSON: text and whole numbers do"
        raise ArtefactError(what, why=why, fix="use text for keys")
    return made


def read_spec(text: str) -> pytree.TreeSpec:
    """What `write_spec` gave. Raises ArtefactError for a type that is not known here, and
    TypeError, KeyError or ValueError for what is no spec."""
    _, schema = json.loads(text)
    _check(schema)
    return pytree.treespec_loads(text)


def _check(schema: Any) -> None:
    """Refuse what would make torch's reader import something, or what it does not know."""
    kind, context = schema["type"], schema["context"]
    if kind is not None and kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        module = str(kind).rpartition(".")[0]
        raise ArtefactError(
            "its calls cannot be made here", why=f"they take or return a {kind}, and nothing in "
            "this process has registered that type", fix=f"import {module} before loading",
        )  # fmt: skip
    if kind == "collections.defaultdict":
        place = (context["default_factory_module"], context["default_factory_name"])
        if place not in [("builtins", name) for name in FACTORIES]:
            _foreign(f"a defaultdict with the factory {'.'.join(map(str, place))}")
        context = context["dict_context"]
    _check_context(context)
    for child in schema["children_spec"]:
        _check(child)


def _check_context(context: Any) -> None:
    if isinstance(context, str):  # of most types the context is JSON inside JSON
        try:
            context = json.loads(context)
        except ValueError:
            return
        if isinstance(context, str):
            return
    if isinstance(context, dict):
        if "__enum__" in context:
            _foreign("an enum")
        for value in context.values():
            _check_context(value)
    if isinstance(context, list):
        for value in context:
            _check_context(value)


def _foreign(what: str) -> None:
    raise ArtefactError(
        "its calls cannot be made here", why=f"they take or return {what}, and to read that torch "
        "would import a module that the file names", fix="use plain keys and factories",
    )  # fmt: skip


def _named(spec: pytree.TreeSpec) -> str:
    """The types in a spec that are not plain containers, or else the outermost one."""
    plain = (tuple, list, dict)
    names = [_name(s) for s in _all(spec) if not s.is_leaf() and s.type not in plain]
    return ", ".join(dict.fromkeys(names)) or _name(spec)


def _all(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    children: Sequence[Any] = spec.children()
    return [spec, *(s for child in children for s in _all(child))]


def _name(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "a tensor"
    kind = spec.context if isinstance(spec.context, type) else spec.type
    return f"{kind.__module__}.{kind.__qualname__}"
