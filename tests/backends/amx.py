"""A CPU with AMX, on any: plans are made for its tiles and kernels emulate its instructions."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from effc.backends.cpu import products
from effc.backends.cpu.features import CpuFeatures, detect
from effc.codegen.build import build

EMULATED = ("-DEFFC_EMULATE_AMX",)
REAL = ("-mamx-tile", "-mamx-bf16")


def pretend(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...] = EMULATED) -> None:
    """Plans count on AMX; kernels are built with these flags too."""
    plain = CpuFeatures.flags
    monkeypatch.setattr(CpuFeatures, "flags", lambda *a: (*plain(*a), *flags))
    monkeypatch.setattr(products, "amx", lambda: True)


@contextmanager
def trapped() -> Iterator[None]:
    """The instructions themselves, each one caught and done by a signal handler."""
    source = (Path(__file__).parent / "amx_trap.cpp").read_text()
    library = build(source, flags=(*detect().flags(), *EMULATED), name="amx_trap")
    begin = library.function("effc_trap_begin")
    end = library.function("effc_trap_end", restype=ctypes.c_int64)
    begin()
    try:
        yield
    finally:
        done = end()
    assert done > 0
