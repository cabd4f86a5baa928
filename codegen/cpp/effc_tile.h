// Register tiles of matrix products: `ROWS` x `VECTORS` sums kept in registers over a run of k.
//
// Vectors are the compiler's own vector type, so one text serves SSE, AVX2 and AVX-512; the width
// and the tile follow from the instruction set. Only the sources in core/ include this.
#pragma once

#include <utility>

#include "effc.h"

namespace effc {

// EFFC_WIDE: the tile of AVX-512 on any machine, for tests; the compiler splits the vectors.
#if defined(__AVX512F__) || defined(EFFC_WIDE)
constexpr int WIDTH = 16;                       // floats in a vector
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;  // 24 sums and 3 vectors of B in 32 registers
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 sums, 2 vectors of B, 1 of A in 16 registers
#else
constexpr int WIDTH = 4;
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#endif
constexpr int PANEL = TILE_VECTORS * WIDTH;  // columns of a packed panel of B

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

EFFC_INLINE vec load_vec(const float* p) { return *reinterpret_cast<const vec*>(p); }
EFFC_INLINE void store_vec(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

// The first `count` lanes, zero in the others; touches no memory beyond them.
EFFC_INLINE vec load_part(const float* p, int64_t count) {
  float lanes[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load_vec(lanes);
}

EFFC_INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
EFFC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of a block, at most `most`, so that the last one is not much smaller than the others.
EFFC_INLINE int64_t even_block(int64_t rows, int64_t most) {
  const int64_t blocks = (rows + most - 1) / most;
  return up((rows + blocks - 1) / blocks, TILE_ROWS);
}

// Blocks of so many products that are worth a thread.
EFFC_INLINE int64_t grain_of(int64_t products) { return 1 + 500000 / (products + 1); }

// What follows a product: `rows` x `columns` finished sums, of the result's rows from `row` and its
// columns from `column`. Generated for each kernel; it writes the result.
typedef void (*Epilogue)(char* const* p, const int64_t* n, const float* sums, int64_t ld, int64_t row,
                         int64_t rows, int64_t column, int64_t columns);

// One tile of C = A B, or C += A B. B has a row of VECTORS vectors for each k, ldb apart. Row i of A is
// given by `runs` pointers rows[i * runs ...], each to `k` numbers that lie together.
template <int ROWS, int VECTORS>
static void tile(const float* const* rows, int64_t runs, int64_t k, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  vec sums[ROWS][VECTORS] = {};
  for (int64_t r = 0; r < runs; ++r) {
    const float* a[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) a[i] = rows[i * runs + r];
    for (int64_t s = 0; s < k; ++s, b += ldb) {
      vec right[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) right[j] = load_vec(b + j * WIDTH);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const float left = a[i][s];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sums[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * ldc + j * WIDTH;
      store_vec(to, add ? load_vec(to) + sums[i][j] : sums[i][j]);
    }
  }
}

typedef void (*Tile)(const float* const*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int VECTORS, int... I>
EFFC_INLINE Tile rows_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr Tile made[] = {tile<I + 1, VECTORS>...};
  return made[rows - 1];
}

EFFC_INLINE Tile tile_of(int64_t rows, int64_t vectors) {
  constexpr std::make_integer_sequence<int, TILE_ROWS> upto;
  if (vectors == TILE_VECTORS) return rows_of<TILE_VECTORS>(rows, upto);
  if (vectors == 1) return rows_of<1>(rows, upto);
  return rows_of<2>(rows, upto);
}

// C[count, n] = rows of A times packed B, or += that. Panels of PANEL columns of B lie one after the
// other; the last one has as many vectors as it needs. ldc holds whole vectors.
EFFC_INLINE void panels_product(const float* const* rows, int64_t count, int64_t runs, int64_t k,
                                const float* b, int64_t n, float* c, int64_t ldc, bool add = false) {
  for (int64_t j = 0; j < n; j += PANEL, b += runs * k * PANEL) {
    const int64_t vectors = (least(n - j, PANEL) + WIDTH - 1) / WIDTH, ldb = vectors * WIDTH;
    // Rows are shared out evenly: a last tile of one or two would wait for its own sums.
    const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS, some = count / tiles;
    const int64_t larger = count % tiles * (some + 1);  // rows in tiles of one row more
    int64_t i = 0;
    if (larger) {
      const Tile more = tile_of(some + 1, vectors);
      for (; i < larger; i += some + 1) more(rows + i * runs, runs, k, b, ldb, c + i * ldc + j, ldc, add);
    }
    const Tile rest = tile_of(some, vectors);
    for (; i < count; i += some) rest(rows + i * runs, runs, k, b, ldb, c + i * ldc + j, ldc, add);
  }
}

}  // namespace effc
