// Warps of a GPU kernel on a CPU: what translated PTX is written in.
//
// A register of a warp is an array over its 32 lanes; an instruction is a loop over them, which the
// compiler vectorises. Lanes run in lockstep under a mask, so a shuffle or a matrix instruction is
// plain code; only a barrier of the block switches to another warp (effc_simt.cpp). A value that is
// the same in all lanes is a scalar.
//
// Operations are functions that are never inlined: a kernel of a thousand instructions is then a
// thousand calls, which compiles in a fraction of the time of the same loops unrolled.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#define SIMT_OP __attribute__((noinline)) static
#define SIMT_HOT SIMT_OP
#else
#define SIMT_OP __attribute__((noipa)) static
#define SIMT_HOT __attribute__((noipa, optimize("O3"))) static  // kernels themselves compile at -O1
#endif
#define SIMT_INLINE __attribute__((always_inline)) static inline
#ifdef SIMT_CHECK
#define PC(n) (w.pc = (n))
#else
#define PC(n) ((void)0)
#endif

namespace simt {

using Mask = uint32_t;
constexpr Mask ALL = ~0u;

template <class T>
struct alignas(64) Lanes {
  T x[32];
};

enum Space : int { GLOBAL, SHARED, LOCAL, PARAM };
enum Kind : int { READ, WRITE, ATOMIC, ASYNC };
enum Ordering : int { BARRIER = 4, WARP_BARRIER, COMMIT, WAIT };

struct Warp;

// What the scheduler offers a kernel.
struct Hooks {
  void (*barrier)(Warp*, Mask arrived, uint32_t id, uint32_t threads, int wait, int pc);
  uint32_t (*barrier_reduce)(Warp*, Mask arrived, uint32_t id, uint32_t threads, int op, Mask p, int pc);
  void (*yield)(Warp*, int pc);
  void (*fail)(Warp*, int kind, Mask lanes, uint64_t a, uint64_t b, int pc);
  // Checked runs only: false where the access must not happen.
  bool (*access)(Warp*, int lane, int space, int kind, uint64_t address, uint32_t size, const void* value, int pc);
  void (*warp_sync)(Warp*, Mask lanes, int pc);
  void (*async_copy)(Warp*, int lane, uint32_t to, uint64_t from, uint32_t size, uint32_t valid, int pc);
  void (*async_commit)(Warp*, Mask lanes);
  void (*async_wait)(Warp*, Mask lanes, uint32_t keep, int pc);
};

struct alignas(64) Warp {
  Lanes<uint32_t> tid[3];
  Lanes<uint32_t> lane;
  const Hooks* hooks;
  char* shared;
  char* local;
  uint64_t local_bytes;  // of one lane
  const uint32_t *ntid, *nctaid;
  uint32_t ctaid[3];
  uint32_t shared_bytes;
  Mask live;  // lanes that have not exited
  uint32_t index, nwarp;
  int pc;
  uint32_t spins;
  uint64_t clock;
  const uint8_t* order;  // the lanes in the order in which they store; null: ascending
};

enum Fault : int { DIVERGED_BARRIER = 1, STUCK_WARP, TRAP, ASSERT, BAD_CALL };

// What effc_simt_launch takes.
struct Finding {
  int32_t kind, pc, other_pc, space;  // other_pc: -1 where there is none
  uint32_t block[3], thread, other_thread, access, other_access, size;
  uint64_t address, count;
};

struct Region {  // memory the kernel may use
  uint64_t base, bytes;
  uint32_t granule, writable;  // granule: bytes of an element
};

struct Event {  // what a launch did with shared memory, and what put that in order
  int32_t kind, pc;  // kind: of Kind or of Ordering
  uint32_t block, thread, address, size;  // BARRIER, WAIT, COMMIT: size is the lanes
};

struct Launch {
  void (*kernel)(Warp&, const char*);
  const char* params;
  uint32_t grid[3], block[3];
  uint32_t shared_bytes, barriers;  // barriers: warps may wait and need fibers
  uint64_t local_bytes, stack_bytes;
  uint32_t threads, check, order, lazy;
  uint64_t seed;
  const Region* regions;
  uint32_t regions_count, findings_room;
  Finding* findings;
  uint32_t findings_count, across_blocks;  // across_blocks: look for races between blocks
  Event* events;  // null: none are kept
  uint64_t events_room, events_count;
  int32_t left_out, unused;  // left_out: 1 + the place of a barrier or wait that does nothing
};

// ------------------------------------------------------------------ bits and lanes

template <class To, class From>
SIMT_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the width");
  To r;
  __builtin_memcpy(&r, &v, sizeof r);
  return r;
}

// The bits of a result, zero-extended to a register of type D.
template <class D, class T>
SIMT_INLINE D reg(T v) {
  if constexpr (std::is_same_v<T, float>) return D(bits<uint32_t>(v));
  else if constexpr (std::is_same_v<T, double>) return D(bits<uint64_t>(v));
  else if constexpr (std::is_same_v<T, bool>) return D(v);
  else return D(std::make_unsigned_t<T>(v));
}

template <class T>
SIMT_INLINE T at(const T* p, int l) { return p[l]; }
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
SIMT_INLINE T at(T v, int) { return v; }

template <class T, class R>
SIMT_INLINE const T* in(const Lanes<R>& r) { return reinterpret_cast<const T*>(r.x); }

template <class D>
SIMT_OP void fill(D* d, D v) {
  for (int l = 0; l < 32; l++) d[l] = v;
}
template <class D>
SIMT_OP void copy_masked(Mask m, D* d, const D* s) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) d[l] = (m >> l & 1) ? s[l] : d[l];
}

// d = F(a...) in all lanes, or in those of m. d may be an operand.
template <class F, class D, class... A>
SIMT_OP void map(D* d, A... a) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) d[l] = reg<D>(F::f(at(a, l)...));
}
template <class F, class D, class... A>
SIMT_OP void map_masked(Mask m, D* d, A... a) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) {
    const D v = reg<D>(F::f(at(a, l)...));
    d[l] = (m >> l & 1) ? v : d[l];
  }
}
template <class F, class... A>
SIMT_OP Mask compare(A... a) {
  Mask r = 0;
  for (int l = 0; l < 32; l++) r |= F::f(at(a, l)...) ? 1u << l : 0u;
  return r;
}
template <class D, class A, class B>
SIMT_OP void select(D* d, Mask p, A a, B b) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) d[l] = (p >> l & 1) ? D(at(a, l)) : D(at(b, l));
}
template <class D, class A, class B>
SIMT_OP void select_masked(Mask m, D* d, Mask p, A a, B b) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) {
    const D v = (p >> l & 1) ? D(at(a, l)) : D(at(b, l));
    d[l] = (m >> l & 1) ? v : d[l];
  }
}
SIMT_INLINE Mask blend(Mask m, Mask a, Mask b) { return (a & m) | (b & ~m); }
// With a carry in and out, one bit a lane. `old` keeps the carries of lanes outside m.
template <class F, class D, class... A>
SIMT_OP Mask map_carry(Mask m, Mask old, D* d, A... a) {
  Mask r = old & ~m;
  for (int l = 0; l < 32; l++) {
    bool c = old >> l & 1;
    const D v = F::f(c, at(a, l)...);
    if (m >> l & 1) {
      d[l] = v;
      r |= Mask(c) << l;
    }
  }
  return r;
}

// Lanes of m, in the order the schedule gives.
template <class F>
SIMT_INLINE void each(const Warp& w, Mask m, F&& f) {
#ifdef SIMT_CHECK
  if (w.order) {
    for (int i = 0; i < 32; i++)
      if (m >> w.order[i] & 1) f(int(w.order[i]));
    return;
  }
#endif
  (void)w;
  if (m == ALL) {
    for (int l = 0; l < 32; l++) f(l);
  } else {
    for (Mask k = m; k; k &= k - 1) f(__builtin_ctz(k));
  }
}

// ------------------------------------------------------------------ 16-bit floats

struct f16 {};
struct bf16 {};

SIMT_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  const float scaled = bits<float>(magnitude << 13) * 0x1p112f;  // exact; subnormals too
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return bits<float>(sign | (magnitude >= 0x7c00 ? special : bits<uint32_t>(scaled)));
}
SIMT_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  // Rounds by adding: 0.5 ulp of the result's last place sits at the float's.
  const uint32_t normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13;
  const uint32_t tiny = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t finite = a < 0x38800000u ? tiny : normal;
  const uint32_t huge = a > 0x7f800000u ? 0x7fffu : 0x7c00u;
  return uint16_t(sign | (a >= 0x477ff000u ? huge : finite));
}
SIMT_INLINE float bf16_to_float(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
SIMT_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(f), rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000u ? 0x7fffu : rounded);
}

#if defined(__F16C__)
typedef short v8hi __attribute__((vector_size(16)));
typedef float v8sf __attribute__((vector_size(32)));
#endif

template <class H, int N>
SIMT_INLINE void widen(const uint16_t* s, float* d) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<H, f16>) {
    for (int i = 0; i < N; i += 8) {
      v8hi h;
      __builtin_memcpy(&h, s + i, 16);
      const v8sf f = __builtin_ia32_vcvtph2ps256(h);
      __builtin_memcpy(d + i, &f, 32);
    }
    return;
  }
#endif
  for (int i = 0; i < N; i++)
    d[i] = std::is_same_v<H, f16> ? half_to_float(s[i]) : bf16_to_float(s[i]);
}
template <class H, int N>
SIMT_INLINE void narrow(const float* s, uint16_t* d) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<H, f16>) {
    for (int i = 0; i < N; i += 8) {
      v8sf f;
      __builtin_memcpy(&f, s + i, 32);
      const v8hi h = __builtin_ia32_vcvtps2ph256(f, 0);
      __builtin_memcpy(d + i, &h, 16);
    }
    return;
  }
#endif
  for (int i = 0; i < N; i++)
    d[i] = std::is_same_v<H, f16> ? float_to_half(s[i]) : float_to_bf16(s[i]);
}
template <class H, int N, class T>
SIMT_INLINE void expand(const T* p, float* d) {
  widen<H, N>(reinterpret_cast<const uint16_t*>(p), d);
}
template <class H, int N, class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
SIMT_INLINE void expand(T v, float* d) {
  constexpr int each = sizeof(T) / 2;
  uint16_t h[8];
  float f[8];
  for (int i = 0; i < 8; i++) h[i] = uint16_t(v >> 16 * (i % each));
  widen<H, 8>(h, f);
  for (int i = 0; i < N; i++) d[i] = f[i % 8];
}
template <class D>
SIMT_INLINE void put(Mask m, D* d, const uint16_t* h) {
  const D* s = reinterpret_cast<const D*>(h);
  for (int l = 0; l < 32; l++) d[l] = (m >> l & 1) ? s[l] : d[l];
}
// Arithmetic of f16, bf16 and their pairs: in float, rounded once.
template <class F, class H, class D, class... A>
SIMT_OP void map_half(Mask m, D* d, A... a) {
  constexpr int N = 32 * sizeof(D) / 2;
  alignas(64) float t[sizeof...(A)][N], o[N];
  alignas(64) uint16_t h[N];
  int k = 0;
  (expand<H, N>(a, t[k++]), ...);
  for (int i = 0; i < N; i++) {
    if constexpr (sizeof...(A) == 1) o[i] = F::f(t[0][i]);
    else if constexpr (sizeof...(A) == 2) o[i] = F::f(t[0][i], t[1][i]);
    else o[i] = F::f(t[0][i], t[1][i], t[2][i]);
  }
  narrow<H, N>(o, h);
  put(m, d, h);
}
template <class H, class A>
SIMT_OP void widen_lanes(float* d, A a) { expand<H, 32>(a, d); }
template <class F, class H, class A, class B>
SIMT_OP Mask compare_half(A a, B b) {
  float x[32], y[32];
  expand<H, 32>(a, x);
  expand<H, 32>(b, y);
  Mask r = 0;
  for (int l = 0; l < 32; l++) r |= F::f(x[l], y[l]) ? 1u << l : 0u;
  return r;
}
template <class H, class D, class A>
SIMT_OP void half_to_float_lanes(Mask m, D* d, A a) {
  alignas(64) float t[32];
  expand<H, 32>(a, t);
  for (int l = 0; l < 32; l++) d[l] = (m >> l & 1) ? bits<uint32_t>(t[l]) : d[l];
}
struct Same {
  static float f(float x) { return x; }
};
struct Relu {
  static float f(float x) { return x < 0 ? 0.0f : x; }
};
template <class F, class H, class D, class A>
SIMT_OP void float_to_half_lanes(Mask m, D* d, A a) {
  alignas(64) float t[32];
  alignas(64) uint16_t h[32];
  for (int l = 0; l < 32; l++) t[l] = F::f(at(a, l));
  narrow<H, 32>(t, h);
  for (int l = 0; l < 32; l++) d[l] = (m >> l & 1) ? D(h[l]) : d[l];
}
template <class F, class H, class A, class B>  // d = {high a, low b}
SIMT_OP void pack_half(Mask m, uint32_t* d, A a, B b) {
  alignas(64) float t[2][32];
  alignas(64) uint16_t h[2][32];
  for (int l = 0; l < 32; l++) t[0][l] = F::f(at(b, l)), t[1][l] = F::f(at(a, l));
  narrow<H, 32>(t[0], h[0]);
  narrow<H, 32>(t[1], h[1]);
  for (int l = 0; l < 32; l++) {
    const uint32_t v = h[0][l] | uint32_t(h[1][l]) << 16;
    d[l] = (m >> l & 1) ? v : d[l];
  }
}

// ------------------------------------------------------------------ moving parts of registers

template <class Part, class Whole, class... P>
SIMT_OP void join(Mask m, Whole* d, P... parts) {
  for (int l = 0; l < 32; l++) {
    Whole v = 0;
    int k = 0;
    ((v |= Whole(Part(at(parts, l))) << (8 * sizeof(Part) * k++)), ...);
    d[l] = (m >> l & 1) ? v : d[l];
  }
}
template <class Part, int K, class Whole>
struct Piece {
  static Part f(Whole v) { return Part(v >> (8 * sizeof(Part) * K)); }
};

// ------------------------------------------------------------------ memory

template <int S>
SIMT_INLINE char* where(const Warp& w, int lane, uint64_t a) {
  if constexpr (S == SHARED) return w.shared + uint32_t(a);
  else if constexpr (S == LOCAL) return w.local + lane * w.local_bytes + uint32_t(a);
  else return reinterpret_cast<char*>(a);
}
SIMT_INLINE bool allowed(Warp& w, int lane, int space, int kind, uint64_t a, uint32_t size,
                         const void* value = nullptr) {
#ifdef SIMT_CHECK
  return w.hooks->access(&w, lane, space, kind, a, size, value, w.pc);
#else
  (void)w, (void)lane, (void)space, (void)kind, (void)a, (void)size, (void)value;
  return true;
#endif
}
template <class T>
SIMT_INLINE bool in_a_row(const uint64_t* a, uint64_t stride) {
  uint64_t wrong = 0;
  for (int l = 0; l < 32; l++) wrong |= a[l] ^ (a[0] + l * stride);
  return !wrong;
}
template <class T, class A>
SIMT_INLINE bool in_a_row(A, uint64_t) { return false; }

// Loads of T into registers of D (sign or zero extended by T), a pointer for each element.
template <class T, int S, class A, class... D>
SIMT_OP void load(Warp& w, Mask m, A a, int64_t off, D*... d) {
  constexpr int N = sizeof...(D);
#ifndef SIMT_CHECK
  if (S == GLOBAL && m == ALL && in_a_row<T>(a, N * sizeof(T))) {
    const T* p = reinterpret_cast<const T*>(uint64_t(at(a, 0)) + off);
    T t[32 * N];  // registers never overlap memory; a copy tells the compiler
    __builtin_memcpy(t, p, sizeof t);
    for (int l = 0; l < 32; l++) {
      int k = 0;
      ((d[l] = std::remove_pointer_t<decltype(d)>(t[N * l + k++])), ...);
    }
    return;
  }
#endif
  each(w, m, [&](int l) __attribute__((always_inline)) {
    const uint64_t address = uint64_t(at(a, l)) + off;
    T t[N] = {};
    if (allowed(w, l, S, READ, address, sizeof t)) __builtin_memcpy(t, where<S>(w, l, address), sizeof t);
    int k = 0;
    ((d[l] = std::remove_pointer_t<decltype(d)>(t[k++])), ...);
  });
}
// The same address in all lanes: one load.
template <class T, int S>
SIMT_OP T load_uniform(Warp& w, Mask m, uint64_t address) {
#ifdef SIMT_CHECK
  bool good = true;
  each(w, m, [&](int l) { good = allowed(w, l, S, READ, address, sizeof(T)) && good; });
  if (!good) return T();
#endif
  (void)m;
  T t;
  __builtin_memcpy(&t, where<S>(w, 0, address), sizeof t);
  return t;
}
template <class T, int S, class A, class... V>
SIMT_OP void store(Warp& w, Mask m, A a, int64_t off, V... v) {
  constexpr int N = sizeof...(V);
#ifndef SIMT_CHECK
  if (S == GLOBAL && m == ALL && in_a_row<T>(a, N * sizeof(T))) {
    T* p = reinterpret_cast<T*>(uint64_t(at(a, 0)) + off);
    T t[32 * N];
    for (int l = 0; l < 32; l++) {
      int k = 0;
      ((t[N * l + k++] = T(at(v, l))), ...);
    }
    __builtin_memcpy(p, t, sizeof t);
    return;
  }
#endif
  each(w, m, [&](int l) __attribute__((always_inline)) {
    const uint64_t address = uint64_t(at(a, l)) + off;
    T t[N] = {T(at(v, l))...};
    if (allowed(w, l, S, WRITE, address, sizeof t, t)) __builtin_memcpy(where<S>(w, l, address), t, sizeof t);
  });
}
// Parameters of device functions: `bytes` for each lane in turn.
template <class T, class... D>
SIMT_OP void load_private(Mask m, const char* p, uint32_t bytes, D*... d) {
  for (int l = 0; l < 32; l++) {
    if (!(m >> l & 1)) continue;
    const char* q = p + l * bytes;
    T t;
    ((__builtin_memcpy(&t, q, sizeof t), q += sizeof t, d[l] = std::remove_pointer_t<decltype(d)>(t)), ...);
  }
}
template <class T, class... V>
SIMT_OP void store_private(Mask m, char* p, uint32_t bytes, V... v) {
  for (int l = 0; l < 32; l++) {
    if (!(m >> l & 1)) continue;
    const T t[sizeof...(V)] = {T(at(v, l))...};
    __builtin_memcpy(p + l * bytes, t, sizeof t);
  }
}

// Old value to d (or nowhere); F gives the new one. The only writer while it runs.
template <class F, class T, int S, class D, class A, class... V>
SIMT_OP void atomic(Warp& w, Mask m, D* d, A a, int64_t off, V... v) {
  each(w, m, [&](int l) {
    const uint64_t address = uint64_t(at(a, l)) + off;
    T old = T();
    if (allowed(w, l, S, ATOMIC, address, sizeof(T))) {
      char* p = where<S>(w, l, address);
      __builtin_memcpy(&old, p, sizeof old);
      const T now = F::f(old, at(v, l)...);
      __builtin_memcpy(p, &now, sizeof now);
    }
    if (d) d[l] = reg<D>(old);
  });
}
template <class H>
struct HalfAdd {  // f16 or bf16, one or two
  template <class T>
  static T f(T old, T v) {
    T r = 0;
    for (unsigned i = 0; i < sizeof(T) / 2; i++) {
      const uint16_t a = uint16_t(old >> 16 * i), b = uint16_t(v >> 16 * i);
      const uint16_t s = std::is_same_v<H, f16> ? float_to_half(half_to_float(a) + half_to_float(b))
                                                : float_to_bf16(bf16_to_float(a) + bf16_to_float(b));
      r = T(r | T(s) << 16 * i);
    }
    return r;
  }
};

// cp.async: at once, or in checked runs when the schedule says.
template <class A, class G, class V>
SIMT_OP void async_copy(Warp& w, Mask m, A to, int64_t to_off, G from, int64_t from_off, uint32_t size, V valid) {
  each(w, m, [&](int l) __attribute__((always_inline)) {
    const uint32_t s = uint32_t(at(to, l)) + uint32_t(to_off), n = uint32_t(at(valid, l)), good = n < size ? n : size;
    const uint64_t g = uint64_t(at(from, l)) + from_off;
#ifdef SIMT_CHECK
    w.hooks->async_copy(&w, l, s, g, size, good, w.pc);
#else
    char* p = w.shared + s;
    if (good == 16 && size == 16) {
      __builtin_memcpy(p, reinterpret_cast<const char*>(g), 16);
    } else {
      memcpy(p, reinterpret_cast<const char*>(g), good);
      memset(p + good, 0, size - good);
    }
#endif
  });
}
#ifdef SIMT_CHECK
#define ASYNC_COMMIT(m) w.hooks->async_commit(&w, m)
#define ASYNC_WAIT(m, n, pc) w.hooks->async_wait(&w, m, n, pc)
#define WARP_SYNC(m, pc) w.hooks->warp_sync(&w, m, pc)
#else
#define ASYNC_COMMIT(m) ((void)0)
#define ASYNC_WAIT(m, n, pc) ((void)0)
#define WARP_SYNC(m, pc) ((void)0)
#endif

// ------------------------------------------------------------------ between lanes

SIMT_OP void lanemask_eq(uint32_t* d) { for (int l = 0; l < 32; l++) d[l] = 1u << l; }
SIMT_OP void lanemask_lt(uint32_t* d) { for (int l = 0; l < 32; l++) d[l] = (1u << l) - 1; }
SIMT_OP void lanemask_le(uint32_t* d) { for (int l = 0; l < 32; l++) d[l] = (2u << l) - 1; }
SIMT_OP void lanemask_gt(uint32_t* d) { for (int l = 0; l < 32; l++) d[l] = ~((2u << l) - 1); }
SIMT_OP void lanemask_ge(uint32_t* d) { for (int l = 0; l < 32; l++) d[l] = ~((1u << l) - 1); }

enum Shuffle { UP, DOWN, BFLY, IDX };

template <int MODE, class A, class B, class C>
SIMT_OP Mask shuffle(Mask m, uint32_t* d, A a, B b, C c) {
  uint32_t r[32];
  Mask in_range = 0;
  for (int l = 0; l < 32; l++) {
    const uint32_t control = uint32_t(at(c, l)), by = uint32_t(at(b, l)) & 31;
    const int clamp = control & 31, segment = control >> 8 & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from;
    bool ok;
    if (MODE == UP) from = l - int(by), ok = from >= last;
    else if (MODE == DOWN) from = l + int(by), ok = from <= last;
    else if (MODE == BFLY) from = l ^ int(by), ok = from <= last;
    else from = first | (int(by) & ~segment), ok = from <= last;
    if (!ok) from = l;
    r[l] = at(a, from);
    in_range |= Mask(ok) << l;
  }
  for (int l = 0; l < 32; l++) d[l] = (m >> l & 1) ? r[l] : d[l];
  return in_range;
}
// The usual full exchange l ^ by, without the bounds.
template <class A>
SIMT_OP void shuffle_xor(uint32_t* d, A a, uint32_t by) {
  alignas(64) uint32_t r[32];
  for (int l = 0; l < 32; l++) r[l] = at(a, l ^ int(by & 31));
  memcpy(d, r, sizeof r);
}
// Lanes of m, group by group of those that name the same members.
template <class M, class F>
SIMT_INLINE void groups(Mask m, M member, F&& f) {
  for (Mask todo = m; todo;) {
    const Mask g = (Mask(at(member, __builtin_ctz(todo))) | (todo & -todo)) & m;
    f(g);
    todo &= ~g;
  }
}
template <class M>
SIMT_INLINE Mask members(Mask m, M member) {
  Mask r = 0;
  for (; m; m &= m - 1) r |= Mask(at(member, __builtin_ctz(m)));
  return r;
}
enum Vote { ALL_OF, ANY_OF, UNIFORM, BALLOT };
template <class M>
SIMT_OP void ballot(Mask m, uint32_t* d, Mask p, M member) {
  groups(m, member, [&](Mask g) {
    for (Mask k = g; k; k &= k - 1) d[__builtin_ctz(k)] = p & g;
  });
}
template <int OP, class M>
SIMT_OP Mask vote(Mask m, Mask p, M member) {
  Mask r = 0;
  groups(m, member, [&](Mask g) {
    const Mask t = p & g;
    if (OP == ALL_OF ? t == g : OP == ANY_OF ? t != 0 : t == g || t == 0) r |= g;
  });
  return r;
}
template <class T, class A, class M>
SIMT_OP void match_any(Mask m, uint32_t* d, A a, M member) {
  Mask r[32] = {};
  groups(m, member, [&](Mask g) {
    for (Mask k = g; k; k &= k - 1)
      for (Mask j = g; j; j &= j - 1)
        if (T(at(a, __builtin_ctz(j))) == T(at(a, __builtin_ctz(k)))) r[__builtin_ctz(k)] |= j & -j;
  });
  for (Mask k = m; k; k &= k - 1) d[__builtin_ctz(k)] = r[__builtin_ctz(k)];
}
template <class T, class A, class M>
SIMT_OP Mask match_all(Mask m, uint32_t* d, A a, M member) {
  Mask p = 0;
  groups(m, member, [&](Mask g) {
    bool same = true;
    for (Mask k = g; k; k &= k - 1) same &= T(at(a, __builtin_ctz(k))) == T(at(a, __builtin_ctz(g)));
    for (Mask k = g; k; k &= k - 1) d[__builtin_ctz(k)] = same ? g : 0;
    if (same) p |= g;
  });
  return p;
}
template <class F, class T, class A, class M>
SIMT_OP void redux(Mask m, uint32_t* d, A a, M member) {
  uint32_t v[32];
  groups(m, member, [&](Mask g) {
    T r = T(at(a, __builtin_ctz(g)));
    for (Mask k = g & (g - 1); k; k &= k - 1) r = F::f(r, T(at(a, __builtin_ctz(k))));
    for (Mask k = g; k; k &= k - 1) v[__builtin_ctz(k)] = reg<uint32_t>(r);
  });
  for (Mask k = m; k; k &= k - 1) d[__builtin_ctz(k)] = v[__builtin_ctz(k)];
}

// ------------------------------------------------------------------ address spaces

template <class A>
SIMT_OP void local_to_generic(Warp& w, Mask m, uint64_t* d, A a) {
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) d[l] = uint64_t(w.local + l * w.local_bytes) + uint64_t(at(a, l));
}
template <class A>
SIMT_OP void generic_to_local(Warp& w, Mask m, uint64_t* d, A a) {
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) d[l] = uint64_t(at(a, l)) - uint64_t(w.local + l * w.local_bytes);
}
template <int S, class A>
SIMT_OP Mask is_in_space(Warp& w, A a) {
  Mask r = 0;
  for (int l = 0; l < 32; l++) {
    const uint64_t p = at(a, l), s = uint64_t(w.shared), t = uint64_t(w.local);
    const bool shared = p >= s && p < s + w.shared_bytes, local = p >= t && p < t + 32 * w.local_bytes;
    r |= Mask(S == SHARED ? shared : S == LOCAL ? local : !shared && !local) << l;
  }
  return r;
}

// ------------------------------------------------------------------ lanes that part and meet again

// Lanes that wait at each block, and the blocks in the order of the text. Blocks that only start
// when certain lanes are there step back until more come.
template <int N>
struct Pending {
  Mask at[N] = {};
  uint64_t waiting[(N + 63) / 64] = {}, parked[(N + 63) / 64] = {};
  uint32_t turns = 0;
  void add(int i, Mask m) {
    if (!m) return;
    at[i] |= m;
    waiting[i / 64] |= uint64_t(1) << i % 64;
    parked[i / 64] &= ~(uint64_t(1) << i % 64);
  }
  void park(int i, Mask m) {
    add(i, m);
    parked[i / 64] |= uint64_t(1) << i % 64;
  }
  // The first block with lanes, or -1 where none can go on. Blocks from `meeting` on are where all
  // of `act` meet. Now and then another one, so that lanes that spin do not keep those out that
  // they wait for.
  int next(int meeting, Mask act) {
    const int words = (N + 63) / 64, skip = ++turns % 64 == 0 ? int(turns / 64 % 4) : 0;
    int found = -1, seen = 0;
    for (int i = 0; i < words; i++)
      for (uint64_t k = waiting[i] & ~parked[i]; k; k &= k - 1) {
        const int at_block = 64 * i + __builtin_ctzll(k);
        if (at_block >= meeting) return found >= 0 ? found : at[at_block] == act ? at_block : -1;
        found = at_block;
        if (seen++ == skip) return found;
      }
    return found;
  }
  int stuck() const {
    for (int i = 0; i < (N + 63) / 64; i++)
      if (parked[i]) return 64 * i + __builtin_ctzll(parked[i]);
    return 0;
  }
  Mask take(int i) {
    const Mask m = at[i];
    at[i] = 0;
    waiting[i / 64] &= ~(uint64_t(1) << i % 64);
    return m;
  }
};

}  // namespace simt

#include "effc_simt_ops.h"
#include "effc_simt_mma.h"
