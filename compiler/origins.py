"""Readable names: of a graph's arguments, and of the user's module and line behind a node."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

_STEP = re.compile(r"(?:\._(?:modules|parameters|buffers))?\[(['\"]?)([\w.]+)\1\]")
_ROOT = re.compile(r"^[LG]\[(['\"])(.*?)\1\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in [^\n]*)?(?:\n[ \t]+([^\n]*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Origin:
    """Where in the user's program a node comes from: `layers.0.mlp`, `LlamaMLP`, `model.py:41`."""

    module: str
    module_class: str
    source: str
    text: str


def origin(node: torch.fx.Node) -> Origin:
    """The module and the innermost line outside torch itself that made this node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    module_class = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    source, text = innermost_line(node.meta.get("stack_trace") or "")
    return Origin(split_path(path)[1], module_class, source, text)


@lru_cache(maxsize=4096)  # the layers of a deep model share their lines
def innermost_line(trace: str) -> tuple[str, str]:
    """`("model.py:41", "y = self.conv(x)")`: the last frame outside torch, else the last frame."""
    frames = _FRAME.findall(trace)
    frames = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not frames:
        return "", ""
    file, line, text = frames[-1]
    return f"{os.path.basename(file)}:{line}", text.strip()


def is_module_tensor(node: torch.fx.Node) -> bool:
    """True for a parameter, a buffer or a plain tensor that is an attribute of an `nn.Module`."""
    source = _source(node)
    kinds = [type(s).__name__ for s in (source, getattr(source, "base", None))]
    return any("NNModuleSource" in kind or "ParamBufferSource" in kind for kind in kinds)


def _source(node: torch.fx.Node) -> object:
    """Dynamo's description of how it reaches an argument; None in a graph it did not make."""
    source = getattr(node, "_dynamo_source", None)
    return source or getattr(node.meta.get("grapharg"), "source", None)


def _path(node: torch.fx.Node) -> str:
    """`L['self']._modules['conv']._parameters['weight']`."""
    name = getattr(_source(node), "name", "")
    return name() if callable(name) else name  # a method in older releases


def argument_names(placeholders: Sequence[torch.fx.Node]) -> list[str]:
    """A name for each, unique; the root's name is kept only where weights come from several."""
    split = [(*split_path(_path(node)), node) for node in placeholders]
    single = len({root for root, _, node in split if is_module_tensor(node)}) == 1
    names: list[str] = []
    for root, path, node in split:
        whole = ".".join(filter(None, (root, path)))
        name = path if single and is_module_tensor(node) else whole
        name = name if re.fullmatch(r"[\w.]+", name) else node.name
        while name in names:
            name += "_"
        names.append(name)
    return names


@lru_cache(maxsize=4096)
def split_path(path: str) -> tuple[str, str]:
    """`L['self']._modules['a'].b` is `("self", "a.b")`."""
    root = _ROOT.match(path)
    rest = path[root.end() :] if root else path
    return root.group(2) if root else "", _STEP.sub(r".\2", rest).lstrip(".")
