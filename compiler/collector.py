"""Python's collector of reference cycles, held back while something is compiled or loaded.

Beside a model, torch and Dynamo's own objects a full collection takes a third of a second, and what
a compilation makes is mostly kept. Counting references frees the rest at once, as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Also a decorator. A collector that was off already stays off."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


__all__ = ["collector_paused"]
