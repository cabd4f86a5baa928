// Matrix products on the tile registers of AMX: bf16 operands, float32 sums.
//
// A float32 operand is one bf16 part, x = bf16(x), or two: hi = bf16(x), lo = bf16(x - hi). With two
// parts the product is hi hi + hi lo + lo hi. A part keeps 8 bits: what is left out (lo lo, and what
// remains of each operand) is at most 3 * 2^-16 of the product; with one part it is 2 * 2^-8.
//
// -DEFFC_EMULATE_AMX replaces the six instructions by C++ that means the same, so that the text
// around them runs on any CPU. Only the sources in core/ include this.
#pragma once

#include "effc_tile.h"

// Macros, because g++ pastes the number of a tile register into the name it gives to the assembler.
#if defined(EFFC_EMULATE_AMX)
#define EFFC_TILE_CONFIGURE(config) effc::amx::configure(config)
#define EFFC_TILE_RELEASE() effc::amx::configure(effc::amx::Config{})
#define EFFC_TILE_ZERO(t) effc::amx::zero(t)
#define EFFC_TILE_LOAD(t, from, stride) effc::amx::load(t, from, stride)
#define EFFC_TILE_STORE(t, to, stride) effc::amx::store(t, to, stride)
#define EFFC_TILE_DOT(c, a, b) effc::amx::dot(c, a, b)
#else
#define EFFC_TILE_CONFIGURE(config) _tile_loadconfig(&(config))
#define EFFC_TILE_RELEASE() _tile_release()
#define EFFC_TILE_ZERO(t) _tile_zero(t)
#define EFFC_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define EFFC_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define EFFC_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// g++ does not know that a tile is loaded from memory that was written just before.
#define EFFC_TILE_MEMORY() __asm__ volatile("" ::: "memory")

namespace effc {
namespace amx {

constexpr int64_t ROWS = 16;                 // of a tile
constexpr int64_t DEEP = 32;                 // bf16 numbers in a row of A, and of k in a tile of B
constexpr int64_t COLUMNS = 16;              // of a tile of sums
constexpr int64_t NUMBERS = ROWS * DEEP;     // bf16 numbers in a tile, 1 KiB
constexpr int64_t PANEL_COLUMNS = 2 * COLUMNS;

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "what ldtilecfg reads");

#if defined(EFFC_EMULATE_AMX)
// The pseudo code of Intel's manual, volume 2: rows and columns beyond the configured ones are zero.
struct Registers {
  Config config;
  alignas(64) uint8_t data[8][ROWS][64];
};
static thread_local Registers registers;

static void configure(const Config& config) {
  registers.config = config;
  memset(registers.data, 0, sizeof(registers.data));
}

static void zero(int t) { memset(registers.data[t], 0, sizeof(registers.data[t])); }

static void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int i = 0; i < registers.config.rows[t]; ++i) {
    memcpy(registers.data[t][i], static_cast<const char*>(from) + i * stride, registers.config.row_bytes[t]);
  }
}

static void store(int t, void* to, int64_t stride) {
  for (int i = 0; i < registers.config.rows[t]; ++i) {
    memcpy(static_cast<char*>(to) + i * stride, registers.data[t][i], registers.config.row_bytes[t]);
  }
}

// The instruction takes and gives no denormals.
EFFC_INLINE float normal(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

// Numbers of even and of odd k are summed apart, then together, then onto c.
static void dot(int c, int a, int b) {
  const Config& config = registers.config;
  for (int m = 0; m < config.rows[c]; ++m) {
    float even[COLUMNS] = {}, odd[COLUMNS] = {};
    uint16_t left[DEEP], right[DEEP];
    memcpy(left, registers.data[a][m], sizeof(left));
    for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
      const float first = normal(detail::bf16_to_float(left[2 * k]));
      const float second = normal(detail::bf16_to_float(left[2 * k + 1]));
      memcpy(right, registers.data[b][k], sizeof(right));
#pragma omp simd
      for (int n = 0; n < COLUMNS; ++n) {
        even[n] = normal(even[n] + first * normal(detail::bf16_to_float(right[2 * n])));
        odd[n] = normal(odd[n] + second * normal(detail::bf16_to_float(right[2 * n + 1])));
      }
    }
    float sums[COLUMNS];
    memcpy(sums, registers.data[c][m], sizeof(sums));
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) sums[n] = normal(sums[n] + normal(even[n] + odd[n]));
    memcpy(registers.data[c][m], sums, sizeof(sums));
  }
}
#endif

// Tiles 0 to 3 are sums, 4 and 5 hold rows of A, 6 and 7 columns of B; all are whole, and what lies
// beyond an edge is padding in memory. A constant, because g++ takes only 8 bytes of it to be read.
static const Config WHOLE = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Per thread; others in this process may configure theirs.
EFFC_INLINE void begin() { EFFC_TILE_CONFIGURE(WHOLE); }

EFFC_INLINE void end() { EFFC_TILE_RELEASE(); }

// ---------------------------------------------------------------- operands

// DEEP floats as bf16, rounded to nearest even, and with two parts what that left out. No rest of an
// infinity, which would be NaN.
template <int PARTS>
EFFC_INLINE void split(const float* x, uint16_t* hi, uint16_t* lo) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  for (int64_t i = 0; i < DEEP; i += 16) {
    const __m512 value = _mm512_loadu_ps(x + i);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(value);
    _mm256_storeu_si256((__m256i*)(hi + i), high);
    if (PARTS == 2) {
      const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(back), _mm512_set1_ps(HUGE_VALF), _CMP_LT_OQ);
      const __m512 rest = _mm512_maskz_sub_ps(finite, value, back);
      _mm256_storeu_si256((__m256i*)(lo + i), (__m256i)_mm512_cvtneps_pbh(rest));
    }
  }
#else
#pragma omp simd
  for (int64_t i = 0; i < DEEP; ++i) hi[i] = detail::float_to_bf16(x[i]);
  if (PARTS == 2) {
#pragma omp simd
    for (int64_t i = 0; i < DEEP; ++i) {
      const float rest = x[i] - detail::bf16_to_float(hi[i]);
      lo[i] = (hi[i] & 0x7f80) == 0x7f80 ? 0 : detail::float_to_bf16(rest);
    }
  }
#endif
}

template <int PARTS>
EFFC_INLINE void split(const bf16* x, uint16_t* hi, uint16_t*) {
  static_assert(PARTS == 1, "bf16 is one part");
  memcpy(hi, x, DEEP * sizeof(bf16));
}

// `count` numbers and zeros up to whole steps of DEEP; part: numbers between the two parts.
template <int PARTS, class T>
EFFC_INLINE void split_row(const T* x, int64_t count, uint16_t* to, int64_t part) {
  int64_t i = 0;
  for (; i + DEEP <= count; i += DEEP) split<PARTS>(x + i, to + i, to + part + i);
  if (i < count) {
    T last[DEEP] = {};
    memcpy(static_cast<void*>(last), x + i, (count - i) * sizeof(T));
    split<PARTS>(last, to + i, to + part + i);
  }
}

// ---------------------------------------------------------------- products

// A block of 2x2 tiles (or fewer) of sums over `steps` of DEEP products each. A step is 4 loads and 4
// products with one part, 8 and 12 with two. A product takes 16 cycles: so loads may bring 64 bytes a
// cycle with one part and 43 with two before they, and not the products, set the pace.
template <int PARTS, int TALL, int BROAD>
static void tiles(const uint16_t* const* a, int64_t lda, int64_t part, const int64_t* offsets, int64_t steps,
                  const uint16_t* b, float* c, int64_t ldc, bool add) {
  const int64_t step = ldc * sizeof(float);
  const uint16_t *upper = a[0], *lower = TALL == 2 ? a[1] : nullptr;
  float* under = c + ROWS * ldc;
  const auto products = []() __attribute__((always_inline)) {
    EFFC_TILE_DOT(0, 4, 6);
    if (BROAD == 2) EFFC_TILE_DOT(1, 4, 7);
    if (TALL == 2) EFFC_TILE_DOT(2, 5, 6);
    if (TALL == 2 && BROAD == 2) EFFC_TILE_DOT(3, 5, 7);
  };
  const auto left = [=](int64_t offset) __attribute__((always_inline)) {
    EFFC_TILE_LOAD(4, upper + offset, lda);
    if (TALL == 2) EFFC_TILE_LOAD(5, lower + offset, lda);
  };
  const auto right = [](const uint16_t* from) __attribute__((always_inline)) {
    EFFC_TILE_LOAD(6, from, 64);
    if (BROAD == 2) EFFC_TILE_LOAD(7, from + NUMBERS, 64);
  };
  EFFC_TILE_MEMORY();
  if (add) {
    EFFC_TILE_LOAD(0, c, step);
    if (BROAD == 2) EFFC_TILE_LOAD(1, c + COLUMNS, step);
    if (TALL == 2) EFFC_TILE_LOAD(2, under, step);
    if (TALL == 2 && BROAD == 2) EFFC_TILE_LOAD(3, under + COLUMNS, step);
  } else {
    EFFC_TILE_ZERO(0);
    EFFC_TILE_ZERO(1);
    EFFC_TILE_ZERO(2);
    EFFC_TILE_ZERO(3);
  }
  for (int64_t s = 0; s < steps; ++s, b += PARTS * BROAD * NUMBERS) {
    const int64_t offset = offsets[s];
    right(b);
    if (PARTS == 2) {  // lo hi, hi hi, hi lo: each changes one operand only
      left(offset + part);
      products();
    }
    left(offset);
    products();
    if (PARTS == 2) {
      right(b + BROAD * NUMBERS);
      products();
    }
  }
  EFFC_TILE_STORE(0, c, step);
  if (BROAD == 2) EFFC_TILE_STORE(1, c + COLUMNS, step);
  if (TALL == 2) EFFC_TILE_STORE(2, under, step);
  if (TALL == 2 && BROAD == 2) EFFC_TILE_STORE(3, under + COLUMNS, step);
  EFFC_TILE_MEMORY();
}

// Steps of a run, over both parts: its tiles of B, 2 KiB a step, and of A, 2 KiB more that pass by, do
// not exceed the first-level cache (48 KiB). Then B comes from there for all rows and A from the second
// level with 32 bytes a cycle; sums are loaded and stored once a run.
constexpr int64_t RUN = 12;

// Where one of `tiles` tiles of B beside each other begins, in the layout that tiles_product reads.
EFFC_INLINE int64_t place_in_panels(int64_t tile, int64_t tiles, int64_t step, int64_t steps, int64_t part,
                                    int64_t parts) {
  const int64_t panel = tile / 2 * 2, broad = least(2, tiles - panel);
  return ((panel * steps + step * broad) * parts + part * broad + tile - panel) * NUMBERS;
}

// C[ROWS * count, columns] = A B, or += that. Row tile i at step s is ROWS rows from a[i] + offsets[s], lda bytes
// apart, its second part `part` numbers behind. B lies in panels of two tiles' columns, step after
// step, its parts beside each other; a last panel of one tile's columns has one. While a run is used,
// the next one is asked for from memory.
template <int PARTS>
static void tiles_product(const uint16_t* const* a, int64_t count, int64_t lda, int64_t part,
                          const int64_t* offsets, int64_t steps, const uint16_t* b, int64_t columns, float* c,
                          int64_t ldc, bool add = false) {
  const int64_t runs = (steps * PARTS + RUN - 1) / RUN, run = (steps + runs - 1) / runs;
  const int64_t pairs = (count + 1) / 2;
  for (int64_t j = 0; j < columns; j += PANEL_COLUMNS) {
    const bool broad = columns - j > COLUMNS;
    for (int64_t s = 0; s < steps; s += run) {
      const int64_t now = least(run, steps - s), size = now * PARTS * (broad ? 2 : 1) * NUMBERS;
      const int64_t share = up((size + pairs - 1) / pairs, DEEP);  // of the next run: whole lines
      const uint16_t* next = b + size;
      for (int64_t i = 0; i < count; i += 2, next += share) {
        for (int64_t q = 0; q < share; q += DEEP) __builtin_prefetch(next + q, 0, 2);
        const bool tall = i + 1 < count;
        const auto block = tall ? (broad ? tiles<PARTS, 2, 2> : tiles<PARTS, 2, 1>)
                                : (broad ? tiles<PARTS, 1, 2> : tiles<PARTS, 1, 1>);
        block(a + i, lda, part, offsets + s, now, b, c + i * ROWS * ldc + j, ldc, add || s > 0);
      }
      b += size;
    }
  }
}

}  // namespace amx
}  // namespace effc
