// y = x w^T with w in codes (effc_codes.h) and x in floats: codes become floats in registers, and a group's sum
// is multiplied by its scale: scale * (sum x code - zero * sum x). Many rows meet panels of w in floats.
#pragma once

#include "effc_codes_weight.h"

namespace effc {
namespace {

// p: y, x [rows, depth], codes of w, its scale and zero, then what the epilogue reads. n: the epilogue's address;
// rows; of w results, depth, units of a group or 0 for a whole row, the type of scales, what zeros are where there
// are none, and whether there are; steps between rows of x, and its type; rows of a block, columns of a chunk
// (whole panels); then the epilogue's.
struct ByFloats {
  char* const* p;
  const int64_t* n;
  Epilogue epilogue;
  Weight w;
  int64_t rows, ldx, kind, block, chunk;

  ByFloats(char* const* p, const int64_t* n)
      : p(p), n(n), epilogue(reinterpret_cast<Epilogue>(n[0])),
        w(p[2], p[3], p[4], n[2], n[3], n[4], n[5], n[6], n[7] != 0), rows(n[1]), ldx(n[8]), kind(n[9]), block(n[10]),
        chunk(n[11]) {}

  // A row of x, filled up with zeros.
  void row(int64_t i, float* to, int64_t size) const {
    floats_of_kind(kind, p[1], i * ldx, to, w.depth);
    for (int64_t k = w.depth; k < size; ++k) to[k] = 0.0f;
  }

  void finish(const float* sums, int64_t ld, int64_t row, int64_t count, int64_t column, int64_t columns) const {
    epilogue(p, n + 12, sums, ld, row, count, column, columns);
  }
};

// Zeros of WIDTH rows, counted as codes are.
template <int BITS>
EFFC_INLINE vec zeros(const Weight& w, const uint8_t* p) {
  if (!w.zero) return static_cast<float>(w.offset - MIDDLE<BITS>) - vec{};
  return __builtin_convertvector(zeros_at(p) - MIDDLE<BITS>, vec);
}

// to[i][t] = x[i] . w[t] for rows of x that are ld apart; total: the sums of x over groups.
template <int BITS, int ROWS, int TILES>
static void float_products(const Weight& w, const float* x, int64_t ldx, const float* total, const Tiles<TILES>& of,
                           float* to, int64_t ld) {
  vec result[ROWS][TILES] = {};
  const uint8_t* at[TILES];
#pragma GCC unroll 4
  for (int t = 0; t < TILES; ++t) at[t] = of.codes[t];
  for (int64_t g = 0, u = 0; g < w.groups; ++g) {
    const int64_t end = least(u + w.group, w.units);
    vec sums[ROWS][TILES] = {};
    for (; u < end; ++u) {
#pragma GCC unroll 8
      for (int j = 0; j < RUNS; ++j) {
        shorts codes[TILES];
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t) codes[t] = from_middle<BITS>(unpack<BITS>(at[t], j));
#pragma GCC unroll 4
        for (int e = 0; e < RUN; ++e) {
#pragma GCC unroll 4
          for (int t = 0; t < TILES; ++t) {
            const vec right = raised(codes[t], e);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
              sums[i][t] += x[i * ldx + u * UNIT + j * RUN + e] * right;
              keep(sums[i][t]);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) at[t] = next_unit<BITS>(at[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      const vec zero = zeros<BITS>(w, of.zero[t] + g * WIDTH) * RAISED, scale = w.scales_at(of.scale[t] + g * WIDTH);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        result[i][t] += (sums[i][t] - zero * total[i * w.groups + g]) * (scale * (1 / RAISED));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) store_vec(to + i * ld + of.column[t], result[i][t]);
  }
}

template <int BITS>
static void few_by_floats(const ByFloats& l, int64_t threads) {
  const int64_t each = l.w.units * UNIT_BYTES<BITS> * (1 + 2 * l.rows);
  parallel_for(l.w.tiles(), 1 + WORTH / (each + 1), threads, [=](int64_t begin, int64_t end) {
    const Weight& w = l.w;
    const int64_t most = up(AT_ONCE / l.rows, WIDTH) / WIDTH, chunks = (end - begin + most - 1) / most;
    const int64_t chunk = (end - begin + chunks - 1) / chunks, ld = chunk * WIDTH, size = w.units * UNIT;
    float* sums = scratch<float>(l.rows * ld);
    float* x = scratch<float>(l.rows * size);
    float* total = scratch<float>(l.rows * w.groups);
    for (int64_t i = 0; i < l.rows; ++i) {
      l.row(i, x + i * size, size);
      for (int64_t g = 0; g < w.groups; ++g) {
        double sum = 0;
        for (int64_t k = g * w.group * UNIT; k < least((g + 1) * w.group, w.units) * UNIT; ++k) sum += x[i * size + k];
        total[i * w.groups + g] = static_cast<float>(sum);
      }
    }
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t count = least(chunk, end - first), part = (count + STREAMS - 1) / STREAMS, column = first * WIDTH;
      for (int64_t t = 0; t < part; ++t) {
        const Tiles<STREAMS> of = w.some<BITS>(first + t, part, first, first + count);
        int64_t i = 0;
        for (; i + 2 <= l.rows; i += 2) {
          float_products<BITS, 2>(w, x + i * size, size, total + i * w.groups, of, sums + i * ld, ld);
        }
        if (i < l.rows) float_products<BITS, 1>(w, x + i * size, size, total + i * w.groups, of, sums + i * ld, ld);
      }
      l.finish(sums, ld, 0, l.rows, column, least(ld, w.results - column));
    }
    release(sums), release(x), release(total);
  });
}

// Some tiles as panels of floats, as panels_product reads them.
template <int BITS>
static void to_panels(const Weight& w, int64_t tile, int64_t tiles, float* b) {
  for (int64_t t = 0; t < tiles; t += TILE_VECTORS) {
    const int64_t vectors = least(TILE_VECTORS, tiles - t), step = vectors * WIDTH;
    for (int64_t q = 0; q < vectors; ++q) {
      const uint8_t* unit = w.codes_of<BITS>(tile + t + q);
      const uint8_t* first = w.zeros_of(tile + t + q);
      for (int64_t u = 0; u < w.units; ++u, unit += UNIT_BYTES<BITS>) {
        const int64_t group = u / w.group * WIDTH;
        const vec scale = w.scales_at((tile + t + q) * w.groups * WIDTH + group);
        const vec zero = zeros<BITS>(w, first + group);
#pragma GCC unroll 8
        for (int j = 0; j < RUNS; ++j) {
          const shorts codes = from_middle<BITS>(unpack<BITS>(unit, j));
#pragma GCC unroll 4
          for (int e = 0; e < RUN; ++e) {
            store_vec(b + (u * UNIT + j * RUN + e) * step + q * WIDTH, (raised(codes, e) * (1 / RAISED) - zero) * scale);
          }
        }
      }
    }
    b += w.units * UNIT * step;
  }
}

template <int BITS>
static void many_by_floats(const ByFloats& l, int64_t threads) {
  const int64_t block = even_block(l.rows, l.block), blocks = (l.rows + block - 1) / block;
  const int64_t chunks = (l.w.results + l.chunk - 1) / l.chunk;
  const int64_t grain = grain_of(block * least(l.chunk, l.w.results) * l.w.depth);
  parallel_for(blocks * chunks, grain, threads, [=](int64_t begin, int64_t end) {
    const Weight& w = l.w;
    const int64_t size = w.units * UNIT, ld = up(least(l.chunk, w.results), WIDTH);
    float* sums = scratch<float>(block * ld);
    float* b = scratch<float>(size * ld);
    float* x = scratch<float>(block * size);
    const float** rows = scratch<const float*>(block);
    int64_t unpacked = -1, held = -1;  // the chunk that is in b, the block that is in x
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / blocks, column = which * l.chunk, columns = least(l.chunk, w.results - column);
      const int64_t first = at % blocks * block, count = least(block, l.rows - first);
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = x + i * size;
        if (held != first) l.row(first + i, x + i * size, size);
      }
      if (unpacked != which) to_panels<BITS>(w, column / WIDTH, (columns + WIDTH - 1) / WIDTH, b);
      unpacked = which, held = first;
      panels_product(rows, count, 1, size, b, columns, sums, ld);
      l.finish(sums, ld, first, count, column, columns);
    }
    release(sums), release(b), release(x), release(rows);
  });
}

template <int BITS>
static void linear_of_codes_by_floats(char* const* p, const int64_t* n, int64_t threads) {
  const ByFloats l(p, n);
  if (l.rows == 0 || l.w.results == 0) return;
  if (l.rows <= FEW) return few_by_floats<BITS>(l, threads);
  many_by_floats<BITS>(l, threads);
}

}  // namespace
}  // namespace effc
