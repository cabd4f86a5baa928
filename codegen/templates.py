"""Kernel templates: jinja2's, translated once a machine instead of once a process.

Translating ours takes a tenth of a second. What jinja2 makes of a template is kept beside the
kernels that were built, by the template's text and everything else that decides.
"""

from __future__ import annotations

import hashlib
import marshal
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.bccache import Bucket, bc_magic

from .store import Store, StoreError, cache_dir

KIND = "templates"
FILE = "template.bytecode"


@cache
def environment(folder: Path) -> jinja2.Environment:
    """Renders the templates in a folder; a hole that is left unfilled is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, autoescape=False,
        auto_reload=False, bytecode_cache=_Kept(),
    )  # fmt: skip


def render(folder: Path, template: str, holes: dict[str, Any]) -> str:
    """The text of a template with its holes filled; they are plain data, compared as such."""
    return _rendered(folder, template, marshal.dumps(holes, 2))  # later formats vary with sharing


@lru_cache(maxsize=1024)  # layers of a model ask for the same kernel, one after the other
def _rendered(folder: Path, template: str, holes: bytes) -> str:
    return environment(folder).get_template(template).render(**marshal.loads(holes))


class _Kept(jinja2.BytecodeCache):
    """Bytecode in the cache folder, which is trusted as the kernels in it are."""

    def load_bytecode(self, bucket: Bucket) -> None:
        entry = Store(cache_dir()).get(KIND, _key(bucket))
        if entry is not None:
            bucket.bytecode_from_string(entry.file(FILE).read_bytes())

    def dump_bytecode(self, bucket: Bucket) -> None:
        def make(work: Path) -> dict[str, Any]:
            (work / FILE).write_bytes(bucket.bytecode_to_string())
            return {}

        # Costs time only; building kernels tells why it cannot be written.
        with suppress(StoreError):
            Store(cache_dir()).put(KIND, _key(bucket), make)


def _key(bucket: Bucket) -> str:
    made_by = f"{jinja2.__version__} {bc_magic!r} {bucket.key} {bucket.checksum}"
    options = bucket.environment
    flags = f"{options.trim_blocks} {options.lstrip_blocks} {options.undefined.__name__}"
    return hashlib.sha256(f"{made_by} {flags}".encode()).hexdigest()


__all__ = ["environment", "render"]
