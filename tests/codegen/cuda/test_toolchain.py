"""A CUDA compiler is found, or its absence is a value with the command that fixes it."""

from __future__ import annotations

import importlib.metadata

import pytest

from effc.codegen.cuda import compile as compiling
from effc.codegen.cuda import toolchain
from effc.codegen.cuda.toolchain import PROBE, MissingCuda, Nvcc, Nvrtc, find_cuda
from effc.ir import UnsupportedError


@pytest.fixture(autouse=True)
def forget():
    toolchain._find.cache_clear()
    yield
    toolchain._find.cache_clear()


def without_packages(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_nvrtc_of_the_package_comes_first():
    found = find_cuda()
    assert isinstance(found, Nvrtc) and found.version >= (12, 0)
    assert found.identity == f"nvrtc {found.version[0]}.{found.version[1]}"
    made = found.compile(PROBE, {}, 80)
    assert made.ok and ".entry probe" in made.ptx and made.cubin[:4] == b"\x7fELF"
    assert "Used" in made.log


def test_nothing_is_a_value_with_a_fix(tmp_path, monkeypatch):
    without_packages(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_cuda()
    assert isinstance(found, MissingCuda) and not found
    assert str(found) == (
        "no CUDA compiler found (NVRTC: not installed; nvcc: not found); "
        'fix: pip install "effc[cuda]"'
    )
    with pytest.raises(UnsupportedError, match="cannot be compiled: no CUDA compiler found"):
        compiling.compiler()


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    without_packages(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.13").write_text("no library")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = find_cuda()
    assert not found and found.reason.startswith("no CUDA compiler works (")
    assert "libnvrtc.so.13: " in found.tried[0] and "too short" in found.tried[0]


def test_an_nvcc_that_fails_is_named(tmp_path, monkeypatch):
    without_packages(monkeypatch)
    script(tmp_path / "nvcc", 'case "$1" in --version) echo "release 12.9, V1";; *) '
           "echo 'nvcc fatal error: no ptxas' >&2; exit 1;; esac")  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_cuda()
    assert not found
    assert found.tried[1] == f"{tmp_path / 'nvcc'}: nvcc fatal error: no ptxas"


def test_an_old_nvcc_is_none(tmp_path, monkeypatch):
    without_packages(monkeypatch)
    script(tmp_path / "nvcc", 'echo "release 11.8, V1"')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "version 11.8 is too old" in find_cuda().reason


@pytest.mark.slow
def test_nvcc_compiles_the_same_texts(monkeypatch):
    without_packages(monkeypatch)
    found = find_cuda()
    if not found:
        pytest.skip("needs nvcc")
    assert isinstance(found, Nvcc) and found.skipped == ("NVRTC: not installed",)
    text = '#include "effc_product.h"\n#include "effc_reduce.h"\n' + PROBE
    made = found.compile(text, compiling.headers(), 80)
    assert made.ok, made.log
    assert ".entry probe" in made.ptx and compiling.resources(made.log)["registers"] > 0
