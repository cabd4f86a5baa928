// What this machine can do at most: multiply-adds from registers, and bytes from each memory level.
//
// Built once per instruction set, with that set's compiler flags; LANES is its floats per vector.
// Each function works for `repeats` rounds and returns something that depends on all of it, so that
// nothing can be left out. The caller takes the time, and runs one copy per thread.

#include <cstdint>
#include <cstring>

#if defined(__AMX_BF16__) || defined(__AMX_INT8__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_u __attribute__((vector_size(4 * LANES), aligned(4)));

// Latency 4, two a cycle: 8 chains keep both units busy; 12 leave room for a longer latency, and
// with the two factors they fit 16 registers. Names, because g++ keeps an array in memory.
constexpr int CHAINS = 12;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define KEEP(i) __asm__ volatile("" : "+v"(c##i));  // neither merged with the next nor left out

static vec all(float x) { return vec{} + x; }

static float sum(vec v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// 2 * LANES * CHAINS floating-point operations a round. Contracted to fused multiply-adds where the
// instruction set has them.
extern "C" float effc_fma(int64_t repeats, float one) {
  vec a = all(one), b = all(one * 1e-6f), total = {};
#define START(i) vec c##i = all(one * i);
#define STEP(i) c##i = c##i * a + b;
#define ADD(i) total += c##i;
  EACH(START)
  for (int64_t r = 0; r < repeats; ++r) {
    EACH(STEP)
    EACH(KEEP)
  }
  EACH(ADD)
  return sum(total);
#undef START
#undef STEP
#undef ADD
}

// Reads `count` floats, a multiple of 8 * LANES, from memory: in four places at once, which keeps more
// lines on their way than one does (on Zen 3 17 GB/s from memory, not 13).
extern "C" float effc_read(const float* data, int64_t count, int64_t repeats) {
  const int64_t part = count / 4;
  vec acc[8] = {};
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < part; i += 2 * LANES) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) acc[k] += *(const vec_u*)(data + k / 2 * part + i + k % 2 * LANES);
    }
    __asm__ volatile("" : : "r"(data) : "memory");  // the next round reads again
  }
  vec total = {};
  for (int k = 0; k < 8; ++k) total += acc[k];
  return sum(total);
}

// Copies `count` floats, a multiple of 8 * LANES; counted as bytes read and bytes written. Plain
// stores: memory is read before it is overwritten, as it is under generated kernels.
extern "C" float effc_copy(float* to, const float* from, int64_t count, int64_t repeats) {
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < count; i += 8 * LANES) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k)
        *(vec_u*)(to + i + k * LANES) = *(const vec_u*)(from + i + k * LANES);
      __asm__ volatile("" : : "r"(to) : "memory");  // no call of memcpy, which may bypass caches
    }
  }
  return to[count - 1];
}

#ifdef __AVX512BF16__
// 4 * 16 * CHAINS operations a round: pairs of bfloat16 into float32.
extern "C" float effc_bf16(int64_t repeats, float one) {
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(one), _mm512_set1_ps(one));
  float total = 0;
#define START(i) __m512 c##i = _mm512_set1_ps(one * i);
#define STEP(i) c##i = _mm512_dpbf16_ps(c##i, a, a);
#define ADD(i) total += _mm512_reduce_add_ps(c##i);
  EACH(START)
  for (int64_t r = 0; r < repeats; ++r) {
    EACH(STEP)
    EACH(KEEP)
  }
  EACH(ADD)
  return total;
#undef START
#undef STEP
#undef ADD
}
#endif

#if defined(__AMX_TILE__) && (defined(__AMX_BF16__) || defined(__AMX_INT8__))
// The caller has asked the kernel for tile registers.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

static void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}

static float finish() {
  alignas(64) float out[256];
  _tile_stored(0, out, 64);
  _tile_release();
  return out[0];
}

static void clear() {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
}

// Four products a round of 16 x 16 results from 64 bytes of each row.
#ifdef __AMX_BF16__
extern "C" float effc_amx_bf16(int64_t repeats, float) {  // 4 * 2 * 16 * 16 * 32 operations
  configure();
  clear();
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  return finish();
}
#endif
#ifdef __AMX_INT8__
extern "C" float effc_amx_int8(int64_t repeats, float) {  // 4 * 2 * 16 * 16 * 64 operations
  configure();
  clear();
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
  }
  return finish();
}
#endif
#endif
