// Products with a matrix as it lies, x w^T or x v: turned into panels, or multiplied row by row.
#pragma once

#include "effc_tile.h"

namespace effc {

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
static void pack(const float* w, int64_t ldw, int64_t n, int64_t depth, float* b) {
  for (int64_t j = 0; j < n; j += PANEL, b += depth * PANEL) {
    const int64_t vectors = (least(n - j, PANEL) + WIDTH - 1) / WIDTH, step = vectors * WIDTH;
    for (int64_t q = 0; q < vectors; ++q) {
      const float* from = w + (j + q * WIDTH) * ldw;
      const int64_t lanes = least(WIDTH, n - j - q * WIDTH);
      int64_t k = 0;
      for (; lanes == WIDTH && k + WIDTH <= depth; k += WIDTH) {
        vec v[WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) v[i] = load_vec(from + i * ldw + k);
        transpose<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) store_vec(b + (k + i) * step + q * WIDTH, v[i]);
      }
      for (; k < depth; ++k) {
        for (int64_t i = 0; i < WIDTH; ++i) {
          b[k * step + q * WIDTH + i] = i < lanes ? from[i * ldw + k] : 0.0f;
        }
      }
    }
  }
}

// The same of a matrix given by its columns: rows [0, k) of v, `n` numbers each, into panels.
static void pack_columns(const float* v, int64_t ldv, int64_t k, int64_t n, float* b) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t columns = least(n - j, PANEL), step = up(columns, WIDTH);
    for (int64_t i = 0; i < k; ++i, b += step) {
      const float* from = v + i * ldv + j;
      if (columns == PANEL) {
#pragma GCC unroll 4
        for (int q = 0; q < TILE_VECTORS; ++q) store_vec(b + q * WIDTH, load_vec(from + q * WIDTH));
        continue;
      }
      for (int64_t q = 0; q < step; ++q) b[q] = q < columns ? from[q] : 0.0f;
    }
  }
}

EFFC_INLINE float total(vec v) {
  float lanes[WIDTH], sum = 0;
  store_vec(lanes, v);
  for (int half = WIDTH / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  sum = lanes[0];
  return sum;
}

constexpr int FEW_ROWS = 3, FEW_COLUMNS = 4;

template <int ROWS, int COLUMNS>
static void dots(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t depth, float* c, int64_t ldc) {
  vec sums[ROWS][COLUMNS] = {};
  int64_t k = 0;
  for (; k + WIDTH <= depth; k += WIDTH) {
    vec left[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) left[i] = load_vec(x + i * ldx + k);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const vec right = load_vec(w + j * ldw + k);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sums[i][j] += left[i] * right;
    }
  }
  if (k < depth) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const vec right = load_part(w + j * ldw + k, depth - k);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sums[i][j] += load_part(x + i * ldx + k, depth - k) * right;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) c[i * ldc + j] = total(sums[i][j]);
  }
}

typedef void (*Dots)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <int COLUMNS>
EFFC_INLINE Dots dots_of(int64_t rows) {
  return rows == 1 ? dots<1, COLUMNS> : rows == 2 ? dots<2, COLUMNS> : dots<3, COLUMNS>;
}

// C[count, columns] = x w^T, few rows at a time, over w once.
static void few_rows(const float* x, int64_t ldx, int64_t count, const float* w, int64_t ldw, int64_t columns,
                     int64_t depth, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += FEW_COLUMNS) {
    const bool whole = j + FEW_COLUMNS <= columns;
    for (int64_t i = 0; i < count; i += FEW_ROWS) {
      const int64_t rows = least(FEW_ROWS, count - i);
      if (whole) {
        dots_of<FEW_COLUMNS>(rows)(x + i * ldx, ldx, w + j * ldw, ldw, depth, c + i * ldc + j, ldc);
      } else {
        for (int64_t q = j; q < columns; ++q) {
          dots_of<1>(rows)(x + i * ldx, ldx, w + q * ldw, ldw, depth, c + i * ldc + q, ldc);
        }
      }
    }
  }
}

}  // namespace effc
