// Runtime header of every generated CUDA kernel: what effc.h is to C++ kernels, and the instructions
// of a GPU that C++ has no words for.
//
// Every intrinsic is declared once and has two bodies: PTX, for NVRTC and nvcc (sm_80 and newer),
// and one that computes exactly that on a CPU, where effc_cuda_host.h gives a kernel its threads. So
// one text is compiled for a GPU and by a C++ compiler.
//
// Fragments. In a matrix instruction a warp holds each matrix spread over its lanes; lane l is
// thread t = l % 4 of group g = l / 4. A register holds P = 32 / bits elements, the first in its
// low bits, and K is 8 P. With `i` from 0 to P - 1 (PTX ISA, "Matrix Fragments for mma.m16n8k8", ".m16n8k16",
// ".m16n8k32", ".m16n8k64", ".m16n8k256", chapter "Warp Level Matrix Multiply-Accumulate
// Instructions"):
//
//   A, 16 x K, row-major:     a[0]: row g,     column P t + i          a[2]: the same + K / 2 columns
//                             a[1]: row g + 8, column P t + i          a[3]: the same + K / 2 columns
//   B, K x 8, column-major:   b[0]: row P t + i, column g              b[1]: the same + K / 2 rows
//   C and D, 16 x 8, 32 bit:  c[0], c[1]: row g, columns 2 t, 2 t + 1  c[2], c[3]: row g + 8
#pragma once

#if defined(__CUDACC__)
#define EFFC_ON_GPU 1
#include "effc_cuda_device.h"
#else
#define EFFC_ON_GPU 0
#include "effc.h"
#include "effc_cuda_host.h"
#endif

namespace effc {

// ------------------------------------------------------------------ matrix instructions

// d = a b + d, one of 16 x 8.
#if EFFC_ON_GPU
#define EFFC_MMA(name, shape, types, Sum, constraint, host)                                     \
  EFFC_INLINE void name(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {          \
    asm("mma.sync.aligned." shape ".row.col." types                                             \
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                \
        : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                    \
  }
#else
#define EFFC_MMA(name, shape, types, Sum, constraint, host)                            \
  EFFC_INLINE void name(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    gpu::mma<gpu::host>(d, a, b);                                                      \
  }
#endif

EFFC_MMA(mma_f16, "m16n8k16", "f32.f16.f16.f32", float, "f", F16)
EFFC_MMA(mma_bf16, "m16n8k16", "f32.bf16.bf16.f32", float, "f", BF16)
EFFC_MMA(mma_tf32, "m16n8k8", "f32.tf32.tf32.f32", float, "f", TF32)
EFFC_MMA(mma_s8, "m16n8k32", "s32.s8.s8.s32", int32_t, "r", S8)
EFFC_MMA(mma_u8, "m16n8k32", "s32.u8.u8.s32", int32_t, "r", U8)
EFFC_MMA(mma_u8_s8, "m16n8k32", "s32.u8.s8.s32", int32_t, "r", U8S8)
// From sm_90 on these are emulated by 8-bit ones (seen in the machine code).
EFFC_MMA(mma_s4, "m16n8k64", "s32.s4.s4.s32", int32_t, "r", S4)
EFFC_MMA(mma_u4, "m16n8k64", "s32.u4.u4.s32", int32_t, "r", U4)
// d += popcount(a & b), popcount(a ^ b). Native up to sm_90, the second up to sm_89; a kernel with
// them is a module of its own: ptxas 13.0 crashes on a second one in it for sm_100.
EFFC_MMA(mma_b1_and, "m16n8k256", "s32.b1.b1.s32.and.popc", int32_t, "r", B1And)
EFFC_MMA(mma_b1_xor, "m16n8k256", "s32.b1.b1.s32.xor.popc", int32_t, "r", B1Xor)

#undef EFFC_MMA

// By the element type of a and b.
template <class T>
EFFC_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, half>) {
    mma_f16(d, a, b);
  } else {
    static_assert(std::is_same_v<T, bf16>, "mma of half or bf16");
    mma_bf16(d, a, b);
  }
}

// What a tf32 operand holds: x to the nearest of 10 bits of fraction, halves away from zero.
EFFC_INLINE uint32_t to_tf32(float x) {
#if EFFC_ON_GPU
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
#else
  return gpu::to_tf32(x);
#endif
}

// ------------------------------------------------------------------ shared memory

// The block's dynamic shared memory; as many bytes as the kernel was launched with.
#if EFFC_ON_GPU
#define EFFC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define EFFC_SHARED(name) unsigned char* const name = ::effc::gpu::shared()
#endif

// All threads of the block get here, and see what the others wrote.
EFFC_INLINE void block_barrier() {
#if EFFC_ON_GPU
  __syncthreads();
#else
  gpu::block_barrier();
#endif
}

EFFC_INLINE void warp_barrier() {
#if EFFC_ON_GPU
  __syncwarp();
#else
  gpu::warp_barrier();
#endif
}

#if EFFC_ON_GPU
EFFC_INLINE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// N 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of
// matrix l / 8, 16 bytes, aligned; it gets in to[m] elements 2 t and 2 t + 1 of row g of matrix m
// (PTX ISA, ldmatrix). TURNED: of column g. Only the first 8 N lanes' addresses count.
template <int N, bool TURNED = false>
EFFC_INLINE void ldmatrix(uint32_t (&to)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
#if EFFC_ON_GPU
#define EFFC_LDMATRIX(count, turned, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8.x" count turned ".shared.b16 " __VA_ARGS__)
  const uint32_t p = shared_address(row);
  if constexpr (N == 4 && !TURNED) {
    EFFC_LDMATRIX("4", "", "{%0,%1,%2,%3}, [%4];"
                  : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(p) : "memory");
  } else if constexpr (N == 4) {
    EFFC_LDMATRIX("4", ".trans", "{%0,%1,%2,%3}, [%4];"
                  : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(p) : "memory");
  } else if constexpr (N == 2 && !TURNED) {
    EFFC_LDMATRIX("2", "", "{%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(p) : "memory");
  } else if constexpr (N == 2) {
    EFFC_LDMATRIX("2", ".trans", "{%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(p) : "memory");
  } else if constexpr (!TURNED) {
    EFFC_LDMATRIX("1", "", "{%0}, [%1];" : "=r"(to[0]) : "r"(p) : "memory");
  } else {
    EFFC_LDMATRIX("1", ".trans", "{%0}, [%1];" : "=r"(to[0]) : "r"(p) : "memory");
  }
#undef EFFC_LDMATRIX
#else
  gpu::ldmatrix(to, N, TURNED, row);
#endif
}

// Copy BYTES from global to shared memory without waiting; the last BYTES - valid become zero. Both
// addresses are multiples of BYTES; with valid = 0 nothing is read.
template <int BYTES>
EFFC_INLINE void cp_async(void* to, const void* from, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
#if EFFC_ON_GPU
  if constexpr (BYTES == 16) {  // .cg: past the first cache, which such copies only wash out
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "n"(BYTES), "r"(valid)
                 : "memory");
  }
#else
  gpu::cp_async(to, from, BYTES, valid);
#endif
}

// The copies of this thread since the last commit are one group.
EFFC_INLINE void cp_async_commit() {
#if EFFC_ON_GPU
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  gpu::cp_async_commit();
#endif
}

// All groups of this thread but the KEEP latest are there; other threads see them after a barrier.
template <int KEEP>
EFFC_INLINE void cp_async_wait() {
#if EFFC_ON_GPU
  asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#else
  gpu::cp_async_wait(KEEP);
#endif
}

// ------------------------------------------------------------------ between lanes

constexpr uint32_t kAllLanes = 0xffffffffu;

// The value of another lane of the warp: lane ^ mask, lane + n or lane - n where there is one (else
// one's own), or a lane by number. All lanes take part. T has 32 or 64 bits.
#if EFFC_ON_GPU
#define EFFC_SHUFFLE(name, instruction)                    \
  EFFC_INLINE uint32_t name(uint32_t v, uint32_t by) {     \
    return __shfl_##instruction##sync(kAllLanes, v, by);   \
  }
#else
#define EFFC_SHUFFLE(name, instruction) \
  EFFC_INLINE uint32_t name(uint32_t v, uint32_t by) { return gpu::name(v, by); }
#endif
EFFC_SHUFFLE(shuffle_xor, xor_)
EFFC_SHUFFLE(shuffle_down, down_)
EFFC_SHUFFLE(shuffle_up, up_)
EFFC_SHUFFLE(shuffle_from, )
#undef EFFC_SHUFFLE

#define EFFC_SHUFFLE(name)                                                                 \
  template <class T>                                                                       \
  EFFC_INLINE T name(T v, uint32_t by) {                                                   \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 32 or 64 bits");       \
    if constexpr (sizeof(T) == 4) {                                                        \
      return bit_cast<T>(name(bit_cast<uint32_t>(v), by));                                 \
    } else {                                                                               \
      const uint64_t bits = bit_cast<uint64_t>(v);                                         \
      const uint32_t low = name(static_cast<uint32_t>(bits), by);                          \
      const uint32_t high = name(static_cast<uint32_t>(bits >> 32), by);                   \
      return bit_cast<T>(static_cast<uint64_t>(high) << 32 | low);                         \
    }                                                                                      \
  }
EFFC_SHUFFLE(shuffle_xor)
EFFC_SHUFFLE(shuffle_down)
EFFC_SHUFFLE(shuffle_up)
EFFC_SHUFFLE(shuffle_from)
#undef EFFC_SHUFFLE

// Bit l: whether lane l says yes.
EFFC_INLINE uint32_t ballot(bool yes) {
#if EFFC_ON_GPU
  return __ballot_sync(kAllLanes, yes);
#else
  return gpu::ballot(yes);
#endif
}
EFFC_INLINE bool any_lane(bool yes) {
#if EFFC_ON_GPU
  return __any_sync(kAllLanes, yes);
#else
  return gpu::ballot(yes) != 0;
#endif
}
EFFC_INLINE bool all_lanes(bool yes) {
#if EFFC_ON_GPU
  return __all_sync(kAllLanes, yes);
#else
  return gpu::ballot(yes) == kAllLanes;
#endif
}

// ------------------------------------------------------------------ bits and bytes

// c + the sum of four products of bytes, both signed or both unsigned.
EFFC_INLINE int32_t dp4a(int32_t a, int32_t b, int32_t c) {
#if EFFC_ON_GPU
  return __dp4a(a, b, c);
#else
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<uint32_t>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
  }
  return static_cast<int32_t>(sum);
#endif
}
EFFC_INLINE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
#if EFFC_ON_GPU
  return __dp4a(a, b, c);
#else
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
  return c;
#endif
}

// Byte i of the result is byte s of {a, b} (a has 0 to 3), s the low three bits of nibble i of
// `select`; its fourth bit: all bits are the byte's sign.
EFFC_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t select) {
#if EFFC_ON_GPU
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
  return r;
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = select >> 4 * i & 15u;
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (s & 7u)) & 255u;
    r |= (s < 8 ? byte : byte >> 7 ? 255u : 0u) << 8 * i;
  }
  return r;
#endif
}

// TABLE is f(0xf0, 0xcc, 0xaa) for the function f of three bits that is wanted.
template <int TABLE>
EFFC_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(TABLE >= 0 && TABLE < 256, "a table of eight bits");
#if EFFC_ON_GPU
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return r;
#else
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i) {
    if (TABLE >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return r;
#endif
}

EFFC_INLINE int popcount(uint32_t x) {
#if EFFC_ON_GPU
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}
EFFC_INLINE int popcount(uint64_t x) {
#if EFFC_ON_GPU
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

// ------------------------------------------------------------------ runs of elements

// Two floats as half or bf16 in one register, the first in the low bits. One instruction, where two
// conversions would also be stored one by one.
template <class T>
EFFC_INLINE uint32_t pack(float low, float high) {
#if EFFC_ON_GPU
  uint32_t both;
  if constexpr (std::is_same_v<T, half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, bf16>, "pack makes half or bf16");
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#else
  return static_cast<uint32_t>(T(high).bits) << 16 | T(low).bits;
#endif
}

namespace detail {

// BYTES (4, 8 or a multiple of 16) between registers and aligned memory, 16 at a time; written in
// 16s, it is global memory.
template <int BYTES>
EFFC_INLINE void read_words(uint32_t (&to)[BYTES / 4], const void* p) {
#if EFFC_ON_GPU
  if constexpr (BYTES == 4) {
    to[0] = *static_cast<const uint32_t*>(p);
  } else if constexpr (BYTES == 8) {
    const uint2 v = *static_cast<const uint2*>(p);
    to[0] = v.x, to[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      const uint4 v = static_cast<const uint4*>(p)[i];
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  }
#else
  memcpy(to, p, BYTES);
#endif
}

template <int BYTES>
EFFC_INLINE void write_words(void* p, const uint32_t (&from)[BYTES / 4]) {
#if EFFC_ON_GPU
  if constexpr (BYTES == 4) {
    *static_cast<uint32_t*>(p) = from[0];
  } else if constexpr (BYTES == 8) {
    *static_cast<uint2*>(p) = make_uint2(from[0], from[1]);
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      // In PTX, because NVVM makes four stores of a uint4's.
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   ::"l"(__cvta_generic_to_global(static_cast<uint4*>(p) + i)), "r"(from[4 * i]),
                   "r"(from[4 * i + 1]), "r"(from[4 * i + 2]), "r"(from[4 * i + 3]) : "memory");
    }
  }
#else
  memcpy(p, from, BYTES);
#endif
}

}  // namespace detail

// N elements that follow each other in memory, as registers. WHOLE: all N are there and the address
// is a multiple of 16 bytes, or of all N; else only the first `left`, the others staying as they are.
// Stores of 16 bytes or more go to global memory.
template <bool WHOLE, class V, class T, int N>
EFFC_INLINE void load_run(V (&to)[N], const T* p, int64_t left) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  if constexpr (WHOLE && bytes >= 4) {
    uint32_t words[bytes / 4];
    detail::read_words<bytes>(words, p);
    T x[N];
    memcpy(x, words, sizeof(x));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = load(x + i);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (WHOLE || i < left) to[i] = load(p + i);
    }
  }
}

template <bool WHOLE, class V, class T, int N>
EFFC_INLINE void store_run(T* p, const V (&from)[N], int64_t left) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  if constexpr (WHOLE && bytes >= 4) {
    uint32_t words[bytes / 4];
    if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bf16>) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    } else {
      T x[N];
#pragma unroll
      for (int i = 0; i < N; ++i) store(x + i, from[i]);
      memcpy(words, x, sizeof(x));
    }
    detail::write_words<bytes>(p, words);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (WHOLE || i < left) store(p + i, from[i]);
    }
  }
}

}  // namespace effc
