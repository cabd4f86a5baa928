"""A generated kernel: text with a plain C interface, named by what it computes.

Every kernel is one C function

    void NAME(char* const* p, const int64_t* n, int64_t threads)

over addresses `p` and numbers `n` (sizes, strides, scalars), so that plans call any of them the
same way. Two kernels with the same text but for comments have the same name and are built once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import templates

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """name: also of the C function. comment: what it was made for, one line each. alone: a whole
    translation unit, the same for every model. flags: of the compiler, after the house's own."""

    name: str
    body: str
    comment: tuple[str, ...] = ()
    alone: bool = False
    flags: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """The function's text without what is for people: what decides its object."""
        return self.body if self.alone else self.body.replace("@NAME@", self.name).strip()

    @property
    def source(self) -> str:
        """The function's text; include effc.h once before it."""
        if self.alone:
            return self.body
        lines = [f"// {line}" for line in self.comment]
        return "\n".join([*lines, self.code, ""])


def render(template: str, **holes: Any) -> str:
    """The text of `<template>.j2` with its holes filled by plain data."""
    return templates.render(TEMPLATES, f"{template}.j2", holes)


def kernel(
    kind: str, template: str, *, numbers: Sequence[str],
    comment: Iterable[str] = (), **holes: Any,
) -> Kernel:  # fmt: skip
    """Fill a template; the name is the kind and a hash of the text."""
    body = tidy(render(template, numbers=numbers, **holes))
    digest = hashlib.blake2b(body.encode(), digest_size=4).hexdigest()
    return Kernel(f"{kind}_{digest}", body, tuple(comment))


def tidy(text: str) -> str:
    """Without the blank lines and trailing blanks that templates leave behind."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def unit(kernels: Sequence[Kernel]) -> str:
    """One translation unit of several kernels, without their comments: models that share kernels,
    a deeper one or one whose lines moved, share what was built of them."""
    if kernels[0].alone:
        return kernels[0].code
    return "\n".join(['#include "effc.h"\n', *(f"{k.code}\n" for k in kernels)])
