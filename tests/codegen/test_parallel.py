"""effc::parallel_for: all of the range, as many threads as asked for, on torch's own runtime."""

import ctypes
import functools
import multiprocessing
import threading

import pytest
import torch

from effc.codegen.build import build
from effc.codegen.openmp import mapped_runtimes, torch_runtime

if not torch_runtime():
    pytest.skip("needs a torch build with OpenMP", allow_module_level=True)

# <> and not "": one small kernel is not worth a precompiled header of its flags.
SOURCE = """#include <effc.h>
EFFC_EXPORT void parts(int64_t n, int64_t grain, int64_t threads, int64_t* begin, int64_t* end) {
  effc::parallel_for(n, grain, threads, [&](int64_t b, int64_t e, int64_t part) {
    begin[part] = b; end[part] = e;
  });
}
EFFC_EXPORT void who(int64_t n, int64_t threads, uint64_t* ids) {
  effc::parallel_for(n, 1, threads, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) ids[i] = (uint64_t)pthread_self();
  });
}
EFFC_EXPORT int64_t pragma_sum(int64_t n, int t) {
  int64_t c = 0;
  #pragma omp parallel for reduction(+ : c) num_threads(t)
  for (int64_t i = 0; i < n; ++i) c += i;
  return c;
}
"""


@functools.cache
def library():
    return build(SOURCE, name="parallel")


def split(n, grain, threads):
    """Begin and end of every part."""
    begin, end = (ctypes.c_int64 * 64)(*[-1] * 64), (ctypes.c_int64 * 64)(*[-1] * 64)
    kernel = library().function("parts", *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)
    kernel(n, grain, threads, begin, end)
    return [(b, e) for b, e in zip(begin, end) if e >= 0]


def who(n, threads, of=None):
    """The thread that ran each index."""
    ids = (ctypes.c_uint64 * n)()
    kernel = (of or library()).function("who", ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    kernel(n, threads, ids)
    return list(ids)


@pytest.mark.parametrize(
    "n, grain, threads", [(1000, 1, 2), (1001, 1, 3), (7, 1, 16), (100, 40, 8)]
)
def test_parallel_parts_cover_the_range(n, grain, threads):
    parts = split(n, grain, threads)
    assert len(parts) == min(threads, n // grain)
    assert [i for b, e in parts for i in range(b, e)] == list(range(n))


@pytest.mark.parametrize("n, grain, threads", [(1000, 1, 1), (100, 51, 8), (5, 8, 4), (9, 0, 0)])
def test_small_work_stays_on_the_calling_thread(n, grain, threads):
    assert split(n, grain, threads) == [(0, n)]
    assert split(0, grain, threads) == []


def test_parallel_uses_as_many_threads_as_asked_for():
    me = threading.get_ident()
    assert set(who(100, 1)) == {me}
    for threads in (2, 3, torch.get_num_threads()):
        assert len(set(who(100, threads))) == threads
        assert who(100, threads)[0] == me


def test_python_threads_may_run_kernels_at_once():
    results = []

    def work():
        results.extend(split(1000, 1, 3) for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[(0, 334), (334, 667), (667, 1000)]] * 800


def test_a_forked_child_runs_on_one_thread():
    """Loaded before the fork, or after it; the runtime's own threads do not exist there."""
    assert len(set(who(100, 2))) == 2

    def child(pipe):
        late = build(SOURCE + "// late")
        pipe.send([len(set(who(100, 2, of=it))) for it in (library(), late)])

    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(there,))
    process.start()
    there.close()  # so that a child that fails ends the wait
    assert here.poll(60), "the child hangs"
    assert here.recv() == [1, 1]
    process.join()
    assert len(set(who(100, 2))) == 2


def test_one_openmp_runtime_is_mapped():
    torch.ones(100000).add(1)
    kernel = library().function("pragma_sum", ctypes.c_int64, ctypes.c_int, restype=ctypes.c_int64)
    assert kernel(1000, 2) == 499500
    assert len(mapped_runtimes()) == 1
