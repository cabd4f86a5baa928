"""A C++ compiler is found, or its absence is a value with the command that fixes it."""

import pytest

from effc.codegen import openmp, toolchain
from effc.codegen.toolchain import MissingToolchain, Toolchain, find_toolchain, install_command


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_finds_a_working_compiler_and_identifies_it():
    found = find_toolchain()
    assert isinstance(found, Toolchain)
    assert found.kind in ("gcc", "clang") and found.version[0] >= 7
    assert found.banner in found.identity and found.target in found.identity


def test_cxx_comes_first(tmp_path, monkeypatch):
    wrapper = script(tmp_path / "my-cxx", f'exec {find_toolchain().path} "$@"')
    monkeypatch.setenv("CXX", wrapper)
    assert find_toolchain().path == wrapper


def test_cxx_may_have_a_launcher_and_options(tmp_path, monkeypatch):
    launcher = script(tmp_path / "launcher", 'exec "$@"')
    compiler = find_toolchain().path
    monkeypatch.setenv("CXX", f"{launcher} {compiler} -O1")
    found = find_toolchain()
    assert found.command == (launcher, compiler, "-O1") and found.path == compiler
    assert " -O1 " in found.identity


def test_a_compiler_that_fails_is_skipped_and_named(tmp_path, monkeypatch):
    broken = script(tmp_path / "broken", "echo 'fatal error: cmath: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", broken)
    found = find_toolchain()
    assert isinstance(found, Toolchain) and found.path != broken
    assert found.skipped == (f"{broken}: fatal error: cmath: No such file",)


def test_no_compiler_is_a_value_with_a_fix(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_toolchain()
    assert isinstance(found, MissingToolchain) and not found
    assert found.reason == (
        "no C++ compiler found (g++: not found; c++: not found; clang++: not found)"
    )
    assert found.fix and str(found) == f"{found.reason}; fix: {found.fix}"


@pytest.mark.parametrize(
    "text, command",
    [
        ("ID=debian\n", "apt-get install g++"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt-get install g++"),
        ('ID="fedora"\n', "dnf install gcc-c++"),
        ("ID=alpine\n", "apk add g++"),
        ("ID=haiku\n", "install g++ or clang++ (C++17) and put it on PATH, or set CXX"),
    ],
)
def test_install_command_fits_the_system(tmp_path, text, command):
    (tmp_path / "os-release").write_text(text)
    assert install_command(str(tmp_path / "os-release")) == command


def test_the_probe_runs_once_for_all_processes(tmp_path, monkeypatch):
    real, log = find_toolchain().path, tmp_path / "log"
    wrapper = script(tmp_path / "my-cxx", f'echo x >> {log}; exec {real} "$@"')
    monkeypatch.setenv("CXX", wrapper)
    find_toolchain()
    calls = log.read_text()
    toolchain._find.cache_clear()  # as in another process
    assert find_toolchain().path == wrapper
    assert log.read_text() == calls


def test_flags_a_compiler_does_not_know_are_left_out():
    found = find_toolchain()
    assert found.supported(["-O2", "-mno-such-thing"]) == ("-O2",)
    assert found.supported(["-O2", "-g"]) == ("-O2", "-g")


def test_torchs_openmp_runtime_is_the_one_that_is_mapped():
    runtime = openmp.torch_runtime()
    if not runtime:
        pytest.skip("needs a torch build with OpenMP")
    assert runtime.path in openmp.mapped_runtimes()
    assert openmp._used_by_torch() == runtime.path
