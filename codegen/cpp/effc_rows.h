// Products with a matrix as it lies, x w^T or x v: turned into panels, or multiplied row by row. Its
// elements may be 16-bit floats, which become float32 in registers; all sums are float32.
#pragma once

#include "effc_tile.h"

namespace effc {

// ---------------------------------------------------------------- elements as vectors of floats

// WIDTH elements in order.
EFFC_INLINE vec widen(const float* p) { return load_vec(p); }

EFFC_INLINE vec widen(const bf16* p) {
  typedef uint16_t shorts __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
  typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
  return (vec)(__builtin_convertvector(*reinterpret_cast<const shorts*>(p), words) << 16);
}

EFFC_INLINE vec widen(const half* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  float lanes[WIDTH];
  load_row(p, lanes, WIDTH);
  return load_vec(lanes);
#endif
}

EFFC_INLINE vec widen(const int8_t* p) {
  typedef int8_t bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const bytes*>(p), vec);
}

constexpr int STEP = 2 * WIDTH;  // elements of a row that are taken together

// STEP elements are two vectors, in the order that is least work: bf16 by even and odd places, as each
// pair of them is a word that needs a shift or a mask. What they are multiplied with, or become, lies
// in the same order: `to_lanes` and `from_lanes`.
template <int PART, class T>
EFFC_INLINE vec part_of(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint32_t words __attribute__((vector_size(WIDTH * 4), aligned(2), may_alias));
    const words both = *reinterpret_cast<const words*>(p);
    return (vec)(PART ? both & 0xffff0000u : both << 16);
  } else {
    return widen(p + PART * WIDTH);
  }
}

EFFC_INLINE void to_floats(const float* from, float* to, int64_t n) { memcpy(to, from, n * sizeof(float)); }

template <class T>
EFFC_INLINE void to_floats(const T* from, float* to, int64_t n) {
  load_row(from, to, n);
}

// A row of n elements as floats in the order of `part_of` for elements like K, with zeros up to a whole
// STEP.
template <class K, class T>
static void to_lanes_of(const T* from, float* to, int64_t n) {
  to_floats(from, to, n);
  for (int64_t i = n; i < up(n, STEP); ++i) to[i] = 0.0f;
  if constexpr (std::is_same_v<K, bf16>) {
    for (int64_t i = 0; i < n; i += STEP) {
      float some[STEP];
      memcpy(some, to + i, sizeof(some));
      for (int j = 0; j < WIDTH; ++j) to[i + j] = some[2 * j], to[i + WIDTH + j] = some[2 * j + 1];
    }
  }
}

template <class T>
static void to_lanes(const T* from, float* to, int64_t n) {
  to_lanes_of<T>(from, to, n);
}

// n floats in the order of T's parts become floats in order; there is room for a whole STEP.
template <class T>
static void from_lanes(float* row, int64_t n) {
  if constexpr (std::is_same_v<T, bf16>) {
    for (int64_t i = 0; i < n; i += STEP) {
      float some[STEP];
      memcpy(some, row + i, sizeof(some));
      for (int j = 0; j < WIDTH; ++j) row[i + 2 * j] = some[j], row[i + 2 * j + 1] = some[WIDTH + j];
    }
  }
}

// ---------------------------------------------------------------- many rows: panels

// Lane l of vector r becomes lane r of vector l, for WIDTH vectors: log2(WIDTH) rounds of exchanges
// between vectors `S` apart.
template <int S, int... L>
EFFC_INLINE void exchange(vec& a, vec& b, std::integer_sequence<int, L...>) {
  const vec low = __builtin_shufflevector(a, b, ((L & S) ? L - S + WIDTH : L)...);
  const vec high = __builtin_shufflevector(a, b, ((L & S) ? L + WIDTH : L + S)...);
  a = low;
  b = high;
}

template <int S>
EFFC_INLINE void transpose(vec (&v)[WIDTH]) {
  if constexpr (S < WIDTH) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) {
      if (!(i & S)) exchange<S>(v[i], v[i + S], std::make_integer_sequence<int, WIDTH>());
    }
    transpose<2 * S>(v);
  }
}

// Rows [0, n) of w become the columns of B, in panels as panels_product reads them.
template <class T>
static void pack(const T* w, int64_t ldw, int64_t n, int64_t depth, float* b) {
  for (int64_t j = 0; j < n; j += PANEL, b += depth * PANEL) {
    const int64_t vectors = (least(n - j, PANEL) + WIDTH - 1) / WIDTH, step = vectors * WIDTH;
    for (int64_t q = 0; q < vectors; ++q) {
      const T* from = w + (j + q * WIDTH) * ldw;
      const int64_t lanes = least(WIDTH, n - j - q * WIDTH);
      int64_t k = 0;
      for (; lanes == WIDTH && k + WIDTH <= depth; k += WIDTH) {
        vec v[WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) v[i] = widen(from + i * ldw + k);
        transpose<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) store_vec(b + (k + i) * step + q * WIDTH, v[i]);
      }
      for (; k < depth; ++k) {
        for (int64_t i = 0; i < WIDTH; ++i) {
          b[k * step + q * WIDTH + i] = i < lanes ? load(from + i * ldw + k) : 0.0f;
        }
      }
    }
  }
}

// The same of a matrix given by its columns: rows [0, k) of v, `n` numbers each, into panels.
template <class T>
static void pack_columns(const T* v, int64_t ldv, int64_t k, int64_t n, float* b) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t columns = least(n - j, PANEL), step = up(columns, WIDTH);
    for (int64_t i = 0; i < k; ++i, b += step) {
      const T* from = v + i * ldv + j;
      if (columns == PANEL) {
#pragma GCC unroll 4
        for (int q = 0; q < TILE_VECTORS; ++q) store_vec(b + q * WIDTH, widen(from + q * WIDTH));
        continue;
      }
      for (int64_t q = 0; q < step; ++q) b[q] = q < columns ? load(from + q) : 0.0f;
    }
  }
}

// ---------------------------------------------------------------- few rows: as the matrix lies

// The time of so few rows is that of reading the matrix. A core waits least for memory that it reads
// in several places at once, each from its beginning to its end: the prefetcher follows every one of
// them (measured on Zen 3: one place 13 GB/s, four 16, four next to each other 10).
constexpr int64_t STREAMS = 4;
constexpr int64_t FEW_ROWS = 3;  // rows at a time: x STREAMS sums and what they are made of fit 16 registers

// The sum of each of four vectors' lanes.
EFFC_INLINE void totals(vec a, vec b, vec c, vec d, float* to) {
  constexpr std::make_integer_sequence<int, WIDTH> lanes;
  exchange<1>(a, b, lanes);
  exchange<1>(c, d, lanes);
  vec low = a + b, high = c + d;
  exchange<2>(low, high, lanes);
  float sums[WIDTH];
  store_vec(sums, low + high);
  for (int i = 0; i < 4; ++i) to[i] = sums[i];
  for (int i = 4; i < WIDTH; ++i) to[i % 4] += sums[i];
}

// sums[i][j] += x[i] . w[j] over one STEP.
template <int PART, int ROWS, int COLUMNS, class T>
EFFC_INLINE void add_products(const float* x, int64_t ldx, const T* const* w, int64_t k, vec (&sums)[ROWS][STREAMS]) {
  vec left[ROWS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) left[i] = load_vec(x + i * ldx + PART * WIDTH);
#pragma GCC unroll 4
  for (int j = 0; j < COLUMNS; ++j) {
    const vec right = part_of<PART>(w[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sums[i][j] += left[i] * right;
  }
}

// c[i][j] = x[i] . w[j] for rows of x in lanes, and rows of w `apart`; results for neighbouring rows of
// w are `next` apart.
template <int ROWS, int COLUMNS, class T>
static void dots(const float* x, int64_t ldx, const T* w, int64_t apart, int64_t depth, float* c, int64_t ldc,
                 int64_t next) {
  vec sums[ROWS][STREAMS] = {};
  const T* from[COLUMNS];
#pragma GCC unroll 4
  for (int j = 0; j < COLUMNS; ++j) from[j] = w + j * apart;
  int64_t k = 0;
  for (; k + STEP <= depth; k += STEP) {
    add_products<0, ROWS, COLUMNS>(x + k, ldx, from, k, sums);
    add_products<1, ROWS, COLUMNS>(x + k, ldx, from, k, sums);
  }
  if (k < depth) {
    T some[COLUMNS][STEP];
    memset(some, 0, sizeof(some));
    for (int j = 0; j < COLUMNS; ++j) memcpy(some[j], from[j] + k, (depth - k) * sizeof(T)), from[j] = some[j];
    add_products<0, ROWS, COLUMNS>(x + k, ldx, from, 0, sums);
    add_products<1, ROWS, COLUMNS>(x + k, ldx, from, 0, sums);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    float made[4];
    totals(sums[i][0], sums[i][1], sums[i][2], sums[i][3], made);
    for (int j = 0; j < COLUMNS; ++j) c[i * ldc + j * next] = made[j];
  }
}

// f(first row, a constant for how many), over `count` rows in even shares of at most FEW_ROWS.
template <class F>
EFFC_INLINE void in_shares(int64_t count, F f) {
  const int64_t shares = (count + FEW_ROWS - 1) / FEW_ROWS;
  for (int64_t s = 0, i = 0; s < shares; ++s) {
    const int64_t rows = (count - i + shares - s - 1) / (shares - s);
    if (rows == 1) f(i, std::integral_constant<int, 1>());
    if (rows == 2) f(i, std::integral_constant<int, 2>());
    if (rows == 3) f(i, std::integral_constant<int, 3>());
    i += rows;
  }
}

// C[count, columns] = x w^T over w once, for rows of x in lanes.
template <class T>
static void few_rows(const float* x, int64_t ldx, int64_t count, const T* w, int64_t ldw, int64_t columns,
                     int64_t depth, float* c, int64_t ldc) {
  const int64_t part = columns / STREAMS;
  for (int64_t j = 0; j < part; ++j) {
    in_shares(count, [=](int64_t i, auto rows) {
      dots<rows, STREAMS>(x + i * ldx, ldx, w + j * ldw, part * ldw, depth, c + i * ldc + j, ldc, part);
    });
  }
  for (int64_t j = part * STREAMS; j < columns; ++j) {
    in_shares(count, [=](int64_t i, auto rows) {
      dots<rows, 1>(x + i * ldx, ldx, w + j * ldw, 0, depth, c + i * ldc + j, ldc, 0);
    });
  }
}

// c[i] += the sum of a[i][k] w[k] over DEPTH rows of w that are `apart`, and numbers of a `next` apart.
template <int ROWS, int DEPTH, class T>
static void combine(const float* a, int64_t lda, int64_t next, const T* w, int64_t apart, int64_t columns,
                    float* c, int64_t ldc) {
  float left[ROWS][DEPTH];
  for (int i = 0; i < ROWS; ++i) {
    for (int k = 0; k < DEPTH; ++k) left[i][k] = a[i * lda + k * next];
  }
  T some[DEPTH][STEP];
  for (int64_t j = 0; j < columns; j += STEP) {
    const T* from[DEPTH];
#pragma GCC unroll 4
    for (int k = 0; k < DEPTH; ++k) from[k] = w + k * apart + j;
    if (EFFC_UNLIKELY(columns - j < STEP)) {
      memset(some, 0, sizeof(some));
      for (int k = 0; k < DEPTH; ++k) memcpy(some[k], from[k], (columns - j) * sizeof(T)), from[k] = some[k];
    }
    vec first[DEPTH], second[DEPTH];
#pragma GCC unroll 4
    for (int k = 0; k < DEPTH; ++k) first[k] = part_of<0>(from[k]), second[k] = part_of<1>(from[k]);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      float* to = c + i * ldc + j;
      vec low = load_vec(to), high = load_vec(to + WIDTH);
#pragma GCC unroll 4
      for (int k = 0; k < DEPTH; ++k) low += left[i][k] * first[k], high += left[i][k] * second[k];
      store_vec(to, low);
      store_vec(to + WIDTH, high);
    }
  }
}

// C[count, columns] += a w over w once, C in lanes with room for whole STEPs.
template <class T>
static void few_rows_turned(const float* a, int64_t lda, int64_t count, const T* w, int64_t ldw, int64_t depth,
                            int64_t columns, float* c, int64_t ldc) {
  const int64_t part = depth / STREAMS;
  for (int64_t k = 0; k < part; ++k) {
    in_shares(count, [=](int64_t i, auto rows) {
      combine<rows, STREAMS>(a + i * lda + k, lda, part, w + k * ldw, part * ldw, columns, c + i * ldc, ldc);
    });
  }
  for (int64_t k = part * STREAMS; k < depth; ++k) {
    in_shares(count, [=](int64_t i, auto rows) {
      combine<rows, 1>(a + i * lda + k, lda, 0, w + k * ldw, 0, columns, c + i * ldc, ldc);
    });
  }
}

// c[i] += the sum of a[i][k] w[k] for columns of PAIRS STEPs.
template <int ROWS, int PAIRS, class T>
static void weighted(const float* a, int64_t lda, const T* w, int64_t ldw, int64_t depth, float* c, int64_t ldc) {
  vec sums[ROWS][2 * PAIRS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] = load_vec(c + i * ldc + j * WIDTH);
  }
  for (int64_t k = 0; k < depth; ++k, w += ldw) {
    vec right[2 * PAIRS];
#pragma GCC unroll 4
    for (int j = 0; j < PAIRS; ++j) {
      right[2 * j] = part_of<0>(w + j * STEP);
      right[2 * j + 1] = part_of<1>(w + j * STEP);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const float left = a[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * PAIRS; ++j) store_vec(c + i * ldc + j * WIDTH, sums[i][j]);
  }
}

// The same as few_rows_turned for rows of w that are short and few: sums stay in registers.
template <class T>
static void few_rows_short(const float* a, int64_t lda, int64_t count, const T* w, int64_t ldw, int64_t depth,
                           int64_t columns, float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + 2 * STEP <= columns; j += 2 * STEP) {
    in_shares(count, [=](int64_t i, auto rows) {
      weighted<rows, 2>(a + i * lda, lda, w + j, ldw, depth, c + i * ldc + j, ldc);
    });
  }
  for (; j + STEP <= columns; j += STEP) {
    in_shares(count, [=](int64_t i, auto rows) {
      weighted<rows, 1>(a + i * lda, lda, w + j, ldw, depth, c + i * ldc + j, ldc);
    });
  }
  if (j < columns) few_rows_turned(a, lda, count, w + j, ldw, depth, columns - j, c + j, ldc);
}

}  // namespace effc
