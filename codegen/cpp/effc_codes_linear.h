// y = x w^T with w in codes (effc_codes.h): scale * (code - zero), a scale and zero for every group of a row.
//
// x in codes too, 8 bits or fewer: products are added in 32-bit integers over a group, exactly, and groups in
// float32. A zero of w is taken off through the sum of x's codes: sum (w - z) x = sum w x - z sum x; one of x
// through the sum of a row of w. x in floats: codes become floats in registers, or many rows meet panels.
//
// Few rows: w is unpacked as it is read. Many: a tile of w is unpacked once for all rows of a block.
#pragma once

#include "effc_codes_weight.h"

namespace effc {
namespace {

constexpr int64_t CHUNK = 64 / WIDTH;    // tiles of w that many rows meet between two of them

// ---------------------------------------------------------------- x in codes

// A block of rows of x in signed bytes, whole units of them, and what products with them need: the sum of each
// row's codes over every step (times the zero where all are one), and its scales.
struct Codes {
  const int8_t* codes;
  int64_t ld, units, step, steps;  // step: units whose products have one scale on either side
  const int32_t* total;            // [rows, steps]
  const float* scale;              // [rows, steps], or [rows] where `each` is not set
  bool each;

  Codes from(int64_t row) const {
    return {codes + row * ld, ld, units, step, steps, total + row * steps, scale + row * (each ? steps : 1), each};
  }
};

template <int BITS, int PACKED, int ROWS, int TILES>
static void products(const Weight& w, const Codes& x, const Tiles<TILES>& of, float* to, int64_t ld) {
  vec result[ROWS][TILES] = {};
  const uint8_t* at[TILES];
#pragma GCC unroll 4
  for (int t = 0; t < TILES; ++t) at[t] = of.codes[t];
  for (int64_t s = 0, u = 0; s < x.steps; ++s) {
    const int64_t group = u / w.group * WIDTH, end = least(u + x.step, x.units);
    sums32 sums[ROWS][TILES] = {};
    for (; u < end; ++u) {
      add_unit<BITS, PACKED>(x.codes + u * UNIT, x.ld, at, sums);
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) {
        at[t] = BITS == PACKED ? next_unit<PACKED>(at[t]) : at[t] + UNIT_BYTES<PACKED>;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      const vec scale = w.scales_at(of.scale[t] + group);
      const sums32 zero = w.zero ? zeros_at(of.zero[t] + group) : sums32{};
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const int32_t total = x.total[i * x.steps + s];
        const sums32 made = sums[i][t] - (w.zero ? zero * total : total - sums32{});
        const vec factor = x.each ? scale * x.scale[i * x.steps + s] : scale;
        result[i][t] += __builtin_convertvector(made, vec) * factor;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      store_vec(to + i * ld + of.column[t], x.each ? result[i][t] : result[i][t] * x.scale[i]);
    }
  }
}

// p: y, codes of x [rows, whole units], its scale and zero, codes of w, its scale and zero, the sums of its rows
// (of numbers), then what the epilogue reads. n: the epilogue's address; rows; of w results, depth, units of a
// group or 0 for a whole row, the type of scales, what zeros are where there are none, and whether there are;
// steps between rows of x, units of a group of it or 0, the type of its scales, what is taken off its codes to
// make them signed, whether it has zeros (1, or 2 where they are unsigned); rows of a block; then the epilogue's.
struct OfCodes {
  char* const* p;
  const int64_t* n;
  Epilogue epilogue;
  Weight w;
  int64_t rows, ldx, group, kind, shift, zeros, block, step, steps;

  OfCodes(char* const* p, const int64_t* n)
      : p(p), n(n), epilogue(reinterpret_cast<Epilogue>(n[0])),
        w(p[4], p[5], p[6], n[2], n[3], n[4], n[5], n[6], n[7] != 0), rows(n[1]), ldx(n[8]), group(n[9]),
        kind(n[10]), shift(n[11]), zeros(n[12]), block(n[13]) {
    step = n[4] && group ? common(n[4], group) : n[4] + group;
    if (step == 0) step = w.units;
    steps = step ? (w.units + step - 1) / step : 0;
  }

  int64_t groups() const { return group ? (w.units + group - 1) / group : 1; }

  void finish(float* sums, int64_t ld, int64_t row, int64_t count, int64_t column, int64_t columns) const {
    const float* scale = reinterpret_cast<const float*>(p[2]);
    const float* total = reinterpret_cast<const float*>(p[7]) + column;
    for (int64_t i = 0; (zeros || shift) && i < count; ++i) {
      float by;
      floats_of_kind(kind, scale, row + i, &by, 1);
      const uint8_t zero = zeros ? reinterpret_cast<const uint8_t*>(p[3])[row + i] : 0;
      by *= static_cast<float>((zeros == 2 ? zero : static_cast<int8_t>(zero)) - shift);
      for (int64_t j = 0; j < columns; ++j) sums[i * ld + j] -= by * total[j];
    }
    epilogue(p, n + 14, sums, ld, row, count, column, columns);
  }
};

// Rows of x as products read them.
struct Prepared {
  int8_t* codes;
  int32_t* total;
  float* scale;

  Prepared(const OfCodes& l, int64_t rows)
      : codes(scratch<int8_t>(l.shift ? rows * l.w.units * UNIT : 0)), total(scratch<int32_t>(rows * l.steps)),
        scale(scratch<float>(rows * (l.group ? l.steps : 1))) {}
  ~Prepared() { release(codes), release(total), release(scale); }

  Codes rows(const OfCodes& l, int64_t first, int64_t count) const {
    const int8_t* x = reinterpret_cast<const int8_t*>(l.p[1]) + first * l.ldx;
    const int64_t size = l.w.units * UNIT, groups = l.groups();
    const Codes made = {l.shift ? codes : x, l.shift ? size : l.ldx, l.w.units, l.step, l.steps, total, scale, l.group != 0};
    float* each = scratch<float>(groups);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; l.shift && k < size; ++k) {
        codes[i * size + k] = k < l.w.depth ? static_cast<int8_t>(x[i * l.ldx + k] ^ -128) : 0;
      }
      floats_of_kind(l.kind, l.p[2], (first + i) * groups, each, groups);
      if (!l.group) scale[i] = each[0];
      for (int64_t s = 0; s < l.steps; ++s) {
        const int64_t begin = s * l.step, end = least(begin + l.step, l.w.units);
        int32_t sum = 0;
        for (int64_t k = begin * UNIT; k < end * UNIT; ++k) sum += made.codes[i * made.ld + k];
        total[i * l.steps + s] = l.w.zero ? sum : sum * static_cast<int32_t>(l.w.offset);
        if (l.group) scale[i * l.steps + s] = each[begin / l.group];
      }
    }
    release(each);
    return made;
  }
};

// All rows with STREAMS tiles. In registers are sums of four rows with two of them, or of one with all.
template <int BITS>
static void few_tiles(const Weight& w, const Codes& x, int64_t rows, const Tiles<STREAMS>& of, float* to, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= rows || (rows > 4 && rows - i == 3); i += 4) {
    i = least(i, rows - 4);  // three and one of those before
    products<BITS, BITS, 4>(w, x.from(i), of.half(0), to + i * ld, ld);
    products<BITS, BITS, 4>(w, x.from(i), of.half(1), to + i * ld, ld);
  }
  if (i + 2 <= rows) {
    products<BITS, BITS, 2>(w, x.from(i), of.half(0), to + i * ld, ld);
    products<BITS, BITS, 2>(w, x.from(i), of.half(1), to + i * ld, ld);
    i += 2;
  }
  if (i < rows) products<BITS, BITS, 1>(w, x.from(i), of, to + i * ld, ld);
}

template <int BITS>
static void few_of_codes(const OfCodes& l, int64_t threads) {
  const Weight& w = l.w;
  const int64_t each = w.units * UNIT_BYTES<BITS> * (1 + l.rows / 2);
  parallel_for(w.tiles(), 1 + WORTH / (each + 1), threads, [=](int64_t begin, int64_t end) {
    const Weight& w = l.w;
    const int64_t most = up(AT_ONCE / l.rows, WIDTH) / WIDTH, chunks = (end - begin + most - 1) / most;
    const int64_t chunk = (end - begin + chunks - 1) / chunks, ld = chunk * WIDTH;
    float* sums = scratch<float>(l.rows * ld);
    const Prepared prepared(l, l.rows);
    const Codes x = prepared.rows(l, 0, l.rows);
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t count = least(chunk, end - first), part = (count + STREAMS - 1) / STREAMS, column = first * WIDTH;
      for (int64_t t = 0; t < part; ++t) {
        few_tiles<BITS>(w, x, l.rows, w.some<BITS>(first + t, part, first, first + count), sums, ld);
      }
      l.finish(sums, ld, 0, l.rows, column, least(ld, w.results - column));
    }
    release(sums);
  });
}

// The units of a tile, unpacked to bytes.
template <int BITS>
static void unpack_tile(const uint8_t* from, int64_t units, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u, from += UNIT_BYTES<BITS>, to += UNIT_BYTES<8>) {
#pragma GCC unroll 8
    for (int j = 0; j < RUNS; ++j) reinterpret_cast<shorts*>(to)[j] = unpack<BITS>(from, j);
  }
}

template <int BITS>
static void many_of_codes(const OfCodes& l, int64_t threads) {
  const Weight& w = l.w;
  const int64_t block = even_block(l.rows, l.block), blocks = (l.rows + block - 1) / block;
  const int64_t chunks = (w.tiles() + CHUNK - 1) / CHUNK;
  const int64_t grain = grain_of(block * CHUNK * WIDTH * w.depth / 4);
  parallel_for(blocks * chunks, grain, threads, [=](int64_t begin, int64_t end) {
    constexpr int TWO = 2;
    const Weight& w = l.w;
    const int64_t ld = CHUNK * WIDTH, size = w.units * UNIT_BYTES<8>;
    float* sums = scratch<float>(block * ld);
    uint8_t* codes = scratch<uint8_t>(TWO * size);
    const Prepared prepared(l, block);
    Codes x = {};
    int64_t held = -1;  // the block that is prepared
    for (int64_t at = begin; at < end; ++at) {
      const int64_t tile = at % chunks * CHUNK, tiles = least(CHUNK, w.tiles() - tile);
      const int64_t first = at / chunks * block, rows = least(block, l.rows - first);
      if (held != first) x = prepared.rows(l, first, rows);
      held = first;
      Tiles<TWO> of;
      for (int64_t t = 0; t < tiles; t += TWO) {
        for (int q = 0; q < TWO; ++q) {
          const int64_t which = tile + least(t + q, tiles - 1);  // a last one alone is computed twice
          unpack_tile<BITS>(w.codes_of<BITS>(which), w.units, codes + q * size);
          of.codes[q] = codes + q * size, of.zero[q] = w.zeros_of(which);
          of.scale[q] = which * w.groups * WIDTH, of.column[q] = (which - tile) * WIDTH;
        }
        for (int64_t i = 0; i < rows; i += 4) {
          const int64_t row = least(i, rows - 4);  // the last four begin earlier
          products<BITS, 8, 4>(w, x.from(row), of, sums + row * ld, ld);
        }
      }
      l.finish(sums, ld, first, rows, tile * WIDTH, least(tiles * WIDTH, w.results - tile * WIDTH));
    }
    release(sums), release(codes);
  });
}

template <int BITS>
static void linear_of_codes(char* const* p, const int64_t* n, int64_t threads) {
  const OfCodes l(p, n);
  if (l.rows == 0 || l.w.results == 0) return;
  if (l.rows <= FEW) return few_of_codes<BITS>(l, threads);
  many_of_codes<BITS>(l, threads);
}

}  // namespace
}  // namespace effc
