"""CUDA C++ compiled by NVRTC, run on the CPU: divergence, functions, local memory, locks, tensor cores."""

import ctypes
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from effc.codegen.ptx import load, race

LANES = np.arange(32)


def libraries() -> list[Path]:
    """libnvrtc-builtins, which must be loaded first, and libnvrtc, of the package's own files."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        return []
    found = {
        p.name: Path(str(p.locate())) for p in files if ".so" in p.name and ".alt." not in p.name
    }
    return [
        p
        for start in ("libnvrtc-builtins", "libnvrtc.")
        for n, p in found.items()
        if n.startswith(start)
    ]


@pytest.fixture(scope="module")
def nvrtc():
    paths = libraries()
    if len(paths) != 2:
        pytest.skip("needs the package nvidia-cuda-nvrtc")
    headers = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/include"
    ctypes.CDLL(str(paths[0]), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(paths[1]))

    def compile_(source: str) -> str:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
        options = [
            b"--gpu-architecture=compute_80",
            f"-I{headers}".encode(),
            b"--std=c++17",
            b"-lineinfo",
        ]
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        kind = "ProgramLog" if status else "PTX"
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{kind}")(program, text)
        assert not status, text.value.decode()
        return text.value.decode()

    return compile_


@pytest.fixture(scope="module")
def module(nvrtc):
    return load(nvrtc(SOURCE))


SOURCE = r"""
#include <cuda_fp16.h>
__constant__ float table[4] = {1.f, 2.f, 3.f, 4.f};
__device__ int counter = 3;
__device__ __noinline__ float helper(float x, int n) {
  float a[8];
  for (int i = 0; i < 8; i++) a[i] = x * i;
  float s = 0;
  for (int i = 0; i < n; i++) s += a[(i * 3) & 7];
  return s;
}
extern "C" __global__ void branches(const float* __restrict__ x, float* y, int n, int m) {
  extern __shared__ float sh[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  sh[threadIdx.x] = v;
  __syncthreads();
  if (v > 0) for (int j = 0; j < threadIdx.x % 5; j++) v = v * 0.5f + sh[j];
  else v = helper(v, m);
  v += __shfl_xor_sync(__activemask(), v, 1);
  y[i] = v + table[i & 3];
}
extern "C" __global__ void halves(const __half2* x, __half2* y) {
  int i = threadIdx.x;
  y[i] = __hfma2(x[i], x[i], __float2half2_rn(1.5f));
}
extern "C" __global__ void doubles(double* d) {
  int i = threadIdx.x;
  d[i] = sqrt(d[i]) / 3.0 + exp(d[i]);
  switch (i % 5) {
    case 0: d[i] += 1; break;
    case 1: d[i] *= 2; break;
    case 2: d[i] = sin(d[i]); break;
    case 3: d[i] = -d[i]; break;
    default: d[i] = 0;
  }
}
extern "C" __global__ void spin(int* lock, int* out) {  // lanes of one warp take turns
  bool done = false;
  while (!done)
    if (atomicCAS(lock, 0, 1) == 0) {
      out[0] += 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
}
extern "C" __global__ void parts(int* out) {  // halves of a warp exchange in different places
  int s;
  if (threadIdx.x & 1) s = __shfl_sync(0xaaaaaaaa, threadIdx.x, 3) + __reduce_add_sync(0xaaaaaaaa, threadIdx.x);
  else s = __reduce_max_sync(0x55555555, threadIdx.x);
  out[threadIdx.x] = s + __popc(__match_any_sync(~0u, threadIdx.x % 4)) + __any_sync(~0u, threadIdx.x == 7);
}
extern "C" __global__ void asserts(int* x) { if (x[threadIdx.x] == 9) __trap(); }
extern "C" __global__ void tile(const __half* a, const __half* b, float* c) {  // 16 x 8 x 16, one warp
  __shared__ __half s[16 * 16], t[16 * 8];
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) t[i] = b[i];
  __syncwarp();
  unsigned ra[4], rb[2], l = threadIdx.x;
  unsigned pa = (unsigned)__cvta_generic_to_shared(s + (l % 16) * 16 + l / 16 * 8);
  unsigned pb = (unsigned)__cvta_generic_to_shared(t + (l % 16) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3]) : "r"(pa));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(rb[0]), "=r"(rb[1]) : "r"(pb));
  float d[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
  int g = l / 4, q = l % 4 * 2;
  c[g * 8 + q] = d[0]; c[g * 8 + q + 1] = d[1]; c[(g + 8) * 8 + q] = d[2]; c[(g + 8) * 8 + q + 1] = d[3];
}
"""


def test_branches_functions_and_dynamic_shared_memory(module):
    n, m = 200, 11
    x = torch.randn(256)
    y = torch.zeros(256)
    module["branches"].launch(2, [x, y, n, m], block=128, shared=512)
    v = x.numpy().copy()
    for i in range(n):
        t, b, f = i % 128, i // 128, v[i]
        if x[i] > 0:
            for j in range(t % 5):
                f = np.float32(f * np.float32(0.5) + np.float32(x[b * 128 + j]))
        else:
            f = sum((np.float32(x[i] * (k * 3 & 7)) for k in range(m)), np.float32(0))
        v[i] = f
    want = [v[i] + v[i ^ 1] + (i & 3) + 1 for i in range(n)]
    assert np.allclose(y[:n], want, atol=1e-5) and (y[n:] == 0).all()


def test_halves_and_doubles(module):
    x = torch.randn(64).half()
    y = torch.empty_like(x)
    module["halves"].launch(1, [x, y], block=32)
    assert torch.equal(y, (x.double() ** 2 + 1.5).half())
    d = torch.rand(32, dtype=torch.float64) * 5
    e = d.sqrt() / 3 + d.exp()
    module["doubles"].launch(1, [d], block=32)
    want = torch.stack([e + 1, e * 2, e.sin(), -e, e * 0])[torch.arange(32) % 5, torch.arange(32)]
    assert torch.allclose(d, want, rtol=1e-13, atol=1e-13)


def test_lanes_of_a_warp_take_turns_at_a_lock(module):
    lock, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    module["spin"].launch(3, [lock, out], block=64)
    assert out.item() == 192


def test_parts_of_a_warp_exchange_apart(module):
    out = torch.zeros(32, dtype=torch.int32)
    module["parts"].launch(1, [out], block=32)
    assert out.tolist() == [(3 + 256 if t & 1 else 30) + 8 + 1 for t in range(32)]


def test_tensor_core_product_and_its_race(module):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.empty(16, 8)
    report = race(module["tile"], 1, [a, b, c], block=32)
    assert report.clean, str(report)
    assert torch.allclose(report.results[2], a.float() @ b.float(), atol=1e-3)


def test_errors_name_the_line_of_the_source(nvrtc):
    kernel = load(nvrtc('extern "C" __global__ void k(int* x) {\n  x[threadIdx.x + 1] = 1;\n}'))[
        "k"
    ]
    report = race(kernel, 1, [torch.zeros(32, dtype=torch.int32)], block=32)
    assert "out of bounds" in str(report) and "k.cu:2 (PTX line" in str(report)
