"""Built once, by whoever comes first; whole or not at all; and a folder that fails is only slow."""

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from effc.codegen import build as building
from effc.codegen import store
from effc.codegen.build import (
    BuildError,
    Library,
    Unit,
    build,
    build_many,
    explain_miss,
    load_code,
)
from effc.codegen.toolchain import MissingToolchain, find_toolchain

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(scope="module")
def toolchains(tmp_path_factory):
    return tmp_path_factory.mktemp("toolchains")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, toolchains):
    """A cache of its own, apart from what is known of the compiler; nothing is remembered."""
    (tmp_path / "cache" / "v1").mkdir(parents=True)
    (tmp_path / "cache" / "v1" / "toolchain").symlink_to(toolchains)
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_loaded", {})
    return tmp_path / "cache"


def answer(library):
    return library.function("answer", restype=ctypes.c_int)()


def fresh(*args, **kwargs):
    """Build as a new process would."""
    building._loaded.clear()
    return build(*args, **kwargs)


def entry_file(library, name):
    return library.path.parent / name


def compiler_that(path, does):
    """A script that compiles after what the shell text `does`; $real is the real compiler."""
    path.write_text(f"#!/bin/sh\nreal={find_toolchain().path}\n{does}\n")
    path.chmod(0o755)
    return str(path)


def slow_compiler(path, seconds, log):
    """Writes half of its output, waits, and then does its work."""
    wait = f"echo start >> {log}; echo half > kernel.o; sleep {seconds}"
    return compiler_that(path, f'case "$*" in *"-c kernel.cpp"*) {wait};; esac\nexec $real "$@"')


class Child:
    """Another process, forked so that it need not import torch again."""

    def __init__(self, work):
        fork = multiprocessing.get_context("fork")
        self.said, said = fork.Pipe(duplex=False)
        self.process = fork.Process(target=lambda: said.send(work()))
        self.process.start()
        said.close()

    def result(self, seconds=60):
        assert self.said.poll(seconds)
        return self.said.recv()


def build_in_child():
    library = fresh(SOURCE)
    return answer(library), library.built


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_builds_then_finds(cache):
    first, second = build(SOURCE), fresh(SOURCE)
    assert (answer(first), first.built, first.notes) == (42, True, ())
    assert (answer(second), second.built, second.path) == (42, False, first.path)
    assert entry_file(first, "kernel.cpp").read_text() == SOURCE
    assert not list((cache / "v1" / "tmp").iterdir()) and not list(
        (cache / "v1" / "locks").iterdir()
    )


def test_the_same_library_comes_back_while_it_is_in_use():
    assert build(SOURCE) is build(SOURCE)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFC_CACHE_DIR", "here")
    compiler_that(tmp_path / "cxx", 'exec $real "$@"')
    monkeypatch.setenv("CXX", "./cxx")
    library = build('#include "effc.h"\n' + SOURCE, flags=["-O0"])
    assert answer(library) == 42 and library.notes == ()
    assert library.path.is_relative_to(tmp_path / "here")


@pytest.mark.parametrize(
    "env, folder",
    [
        ({"EFFC_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/effc"),
        ({"HOME": "/c"}, "/c/.cache/effc"),
    ],
)
def test_where_the_cache_is(monkeypatch, env, folder):
    for name in ("EFFC_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert str(store.cache_dir()) == folder


def test_a_missing_symbol_is_named():
    with pytest.raises(BuildError, match=r"kernel k: .*kernel\.so exports no question"):
        build(SOURCE, name="k").function("question")


def test_flags_and_source_are_in_the_key():
    keys = {build(SOURCE).key, build(SOURCE, flags=["-O1"]).key, build(SOURCE + "\n").key}
    assert len(keys) == 3


def test_explain_miss_names_what_differs():
    assert str(explain_miss(SOURCE)) == "absent; the cache holds nothing comparable"
    key = build(SOURCE, flags=["-O2", "-g"], name="answer").key[:12]
    assert explain_miss(SOURCE, flags=["-O2", "-g"]) is None
    near = f"absent; nearest is {key} (answer): "
    assert str(explain_miss(SOURCE, flags=["-O2", "-DX"])) == f"{near}flags: with -DX, without -g"
    other = SOURCE.replace("42", "43")
    assert str(explain_miss(other, flags=["-O2", "-g"])) == (
        f"{near}source text; line 1 is {other.strip()!r}, was {SOURCE.strip()!r}"
    )


def test_builds_say_why_to_a_log_that_listens(caplog):
    build(SOURCE, flags=["-O2"], name="answer")
    assert not caplog.messages
    with caplog.at_level("INFO", "effc.codegen"):
        build(SOURCE, flags=["-O1"], name="answer")
        build(SOURCE, flags=["-O1"], name="answer")
    [message] = caplog.messages
    assert message.startswith("building answer: absent; nearest is ")
    assert message.endswith("(answer): flags: with -O1, without -O2")


def test_explain_miss_prefers_the_same_kernel():
    build(SOURCE, name="answer")
    build(SOURCE + "// other", name="other")
    assert "(answer)" in explain_miss(SOURCE + "// new", name="answer").nearest


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_entry_is_rebuilt(damage):
    library = build(SOURCE)
    path = entry_file(library, "manifest.json" if damage == "manifest" else "kernel.so")
    data = path.read_bytes()
    path.unlink()  # never in place: this process has the library mapped
    if damage == "flip":
        path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    elif damage != "remove":
        path.write_bytes(data[: len(data) // 2])
    assert explain_miss(SOURCE).reason != "absent" or damage == "remove"
    again = fresh(SOURCE)
    assert (again.built, answer(again)) == (True, 42)
    assert path.read_bytes() == data


def test_a_compile_error_shows_the_lines():
    source = 'extern "C" int f(int x) {\n  int y = x;\n  return z + y;\n}\n'
    with pytest.raises(BuildError) as caught:
        build(source, name="sum")
    text = str(caught.value)
    assert "kernel sum: the C++ compiler failed" in text and "'z'" in text
    assert "\n    >    3 |   return z + y;\n" in text and "      2 |   int y = x;" in text
    assert f"command: {caught.value.command}" in text and "-O3" in caught.value.command


def test_an_unresolved_symbol_is_a_build_error():
    with pytest.raises(BuildError, match="undefined reference"):
        build('extern "C" int no_such(); extern "C" int f() { return no_such(); }')


def test_no_compiler_is_a_build_error_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = find_toolchain()
    assert isinstance(missing, MissingToolchain)
    with pytest.raises(BuildError) as caught:
        build(SOURCE, toolchain=missing)
    assert caught.value.why == missing.reason and caught.value.fix == missing.fix


def test_two_processes_build_once(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", slow_compiler(tmp_path / "slow-cxx", 1, log))
    children = [Child(build_in_child), Child(build_in_child)]
    assert sorted(child.result() for child in children) == [(42, False), (42, True)]
    assert log.read_text() == "start\n"


def test_a_killed_build_leaves_nothing_in_the_way(cache, tmp_path, monkeypatch):
    log, real = tmp_path / "log", find_toolchain().path
    monkeypatch.setenv("CXX", slow_compiler(tmp_path / "slow-cxx", 3, log))
    victim = Child(build_in_child)
    wait_for(log.exists)
    victim.process.kill()
    victim.process.join()
    assert not list((cache / "v1").glob("objects/*/*"))
    assert len(list((cache / "v1" / "tmp").iterdir())) == 1
    monkeypatch.setenv("CXX", real)
    assert Child(build_in_child).result() == (42, True)
    assert not list((cache / "v1" / "tmp").iterdir())


def test_ctrl_c_ends_compilers_and_leaves_the_cache_clean(cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", slow_compiler(tmp_path / "slow-cxx", 60, log))

    def work():
        try:
            build_many([Unit(f"int x{i};") for i in range(4)], jobs=2)
        except KeyboardInterrupt:
            return "interrupted"

    child = Child(work)
    wait_for(lambda: log.exists() and log.read_text().count("start") == 2)
    os.kill(child.process.pid, signal.SIGINT)
    assert child.result() == "interrupted"
    assert log.read_text().count("start") == 2
    assert not list((cache / "v1" / "tmp").iterdir())
    assert not list((cache / "v1").glob("objects/*/*"))


def test_a_cache_that_is_no_folder_falls_back_with_a_note(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    library = build(SOURCE)
    assert answer(library) == 42
    assert [note.kind for note in library.notes] == ["not-a-folder"]
    assert "set EFFC_CACHE_DIR" in library.notes[0].fix
    assert not library.path.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "number, kind", [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "denied")]
)
def test_a_cache_that_cannot_be_written_falls_back_with_a_note(cache, monkeypatch, number, kind):
    rename = os.rename

    def refuse(source, target):
        if cache in target.parents:
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(store.os, "rename", refuse)
    library = build(SOURCE + f"// {kind}")
    assert answer(library) == 42 and [note.kind for note in library.notes] == [kind]
    assert not list((cache / "v1" / "tmp").iterdir())


def test_a_disk_that_fills_while_compiling_falls_back(cache, tmp_path, monkeypatch):
    say = "echo 'kernel.o: No space left on device' >&2; exit 1"
    does = f'case "$PWD" in {cache}/*) {say};; esac\nexec $real "$@"'
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "full-cxx", does))
    library = build(SOURCE)
    assert answer(library) == 42 and [note.kind for note in library.notes] == ["full"]


def test_a_read_only_cache_still_gives_what_it_holds(cache, monkeypatch):
    build(SOURCE)
    monkeypatch.setattr(store.Store, "put", None)
    assert not fresh(SOURCE).built


def test_build_many_keeps_order_and_limits_compilers(tmp_path, monkeypatch):
    log = tmp_path / "log"
    does = f'echo + >> {log}\n$real "$@"\nr=$?\necho - >> {log}\nexit $r'
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "counting-cxx", does))
    find_toolchain()
    log.write_text("")
    units = [Unit(SOURCE.replace("42", str(i)), f"k{i}") for i in range(6)]
    libraries = build_many(units, jobs=2)
    assert [answer(library) for library in libraries] == list(range(6))
    running = peak = 0
    for mark in log.read_text().split():
        running += 1 if mark == "+" else -1
        peak = max(peak, running)
    assert 1 <= peak <= 2


def test_build_many_reports_every_failure():
    units = [Unit(SOURCE), Unit("int a = b;", "one"), Unit("int c = d;", "two")]
    with pytest.raises(BuildError, match="2 of 3 kernels failed to build") as caught:
        build_many(units)
    assert "kernel one:" in str(caught.value) and "kernel two:" in str(caught.value)


def test_a_header_that_cannot_be_precompiled_is_only_slow(tmp_path, monkeypatch):
    say = "echo 'error: no headers today' >&2; exit 1"
    does = f'case "$*" in *c++-header*) {say};; esac\nexec $real "$@"'
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "no-pch-cxx", does))
    library = build('#include "effc.h"\n' + SOURCE)
    assert answer(library) == 42 and [note.kind for note in library.notes] == ["no-pch"]


def test_the_precompiled_header_is_used():
    if find_toolchain().kind != "gcc":
        pytest.skip("needs g++")
    flags = ["-O0", "-H"]  # -H lists headers: ! marks a precompiled one in use
    with pytest.raises(BuildError) as caught:
        build('#include "effc.h"\nint x = y;', flags=flags)
    assert "! " in caught.value.output and "effc.h.gch" in caught.value.output
    twice = '#include "effc.h"\n#include "effc.h"\n' + SOURCE
    assert answer(build(twice, flags=flags)) == 42


def test_work_of_dead_processes_is_swept_and_that_of_living_ones_is_not(cache):
    tmp, locks = cache / "v1" / "tmp", cache / "v1" / "locks"
    for name in ("objects-dead.xyz", "objects-living.xyz"):
        (tmp / name).mkdir(parents=True)
    locks.mkdir()
    with open(locks / "objects-living", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(SOURCE)
    assert [path.name for path in tmp.iterdir()] == ["objects-living.xyz"]
    assert [path.name for path in locks.iterdir()] == ["objects-living"]


def test_the_manifest_holds_the_parts_of_the_key():
    library = build(SOURCE, name="answer")
    manifest = json.loads(entry_file(library, "manifest.json").read_text())
    assert set(manifest["parts"]) == {"source", "header", "compiler", "flags", "openmp"}
    assert set(manifest["files"]) == {"kernel.cpp", "kernel.so"}
    assert manifest["files"]["kernel.so"][0] == len(library.read())


def test_a_library_can_be_loaded_from_a_file(tmp_path):
    copy = tmp_path / "copy.so"
    copy.write_bytes(build(SOURCE).read())
    assert answer(Library(copy)) == 42


def test_code_from_elsewhere_is_kept_by_its_hash(cache):
    code = build(SOURCE).read()
    library = load_code(code, "given")
    assert answer(library) == 42 and library.read() == code
    assert library.path.is_relative_to(cache / "v1" / "loaded") and library.name == "given"
    assert load_code(code) is library
    library.path.write_bytes(b"damaged")
    building._loaded.clear()
    assert load_code(code).read() == code


def test_code_that_is_none_is_a_build_error():
    with pytest.raises(BuildError, match="kernel given cannot be loaded"):
        load_code(b"hello", "given")
