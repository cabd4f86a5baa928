// x w^T of codes of five levels (effc_levels.h) with floats: see effc_codes_floats.h for what p and n are; w's are in
// bundles, and are unpacked tile by tile.
#include "effc_codes_floats.h"
#include "effc_levels.h"

namespace effc {
namespace {

// w with some tiles unpacked to bytes, in memory of its own.
struct Unpacked {
  Weight w;
  uint8_t* codes;

  Unpacked(const Weight& w, int64_t most) : w(w), codes(scratch<uint8_t>(most * w.units * UNIT_BYTES<8>)) {}
  ~Unpacked() { release(codes); }

  void take(const Weight& from, int64_t tile, int64_t count) {
    const int64_t bundles = (w.units + FIVE - 1) / FIVE, size = w.units * UNIT_BYTES<8>;
    for (int64_t t = 0; t < count; ++t) {
      unpack_levels(from.codes + (tile + t) * bundles * BUNDLE_BYTES, w.units, codes + t * size);
    }
    w.codes = codes - tile * size;
  }
};

static void few_levels_by_floats(const ByFloats& l, int64_t threads) {
  const int64_t each = l.w.units * BUNDLE_BYTES / FIVE * (1 + 2 * l.rows);
  parallel_for((l.w.tiles() + STREAMS - 1) / STREAMS, 1 + WORTH / (STREAMS * each + 1), threads, [=](int64_t begin, int64_t end) {
    const int64_t size = l.w.units * UNIT, groups = l.w.groups;
    float* sums = scratch<float>(l.rows * STREAMS * WIDTH);
    float* x = scratch<float>(l.rows * size);
    float* total = scratch<float>(l.rows * groups);
    for (int64_t i = 0; i < l.rows; ++i) {
      l.row(i, x + i * size, size);
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0;
        for (int64_t k = g * l.w.group * UNIT; k < least((g + 1) * l.w.group, l.w.units) * UNIT; ++k) sum += x[i * size + k];
        total[i * groups + g] = static_cast<float>(sum);
      }
    }
    Unpacked some(l.w, STREAMS);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * STREAMS, last = least(first + STREAMS, l.w.tiles()), ld = STREAMS * WIDTH;
      some.take(l.w, first, last - first);
      const Tiles<STREAMS> of = some.w.some<8>(first, 1, first, last);
      for (int64_t i = 0; i < l.rows; ++i) {
        float_products<8, 1>(some.w, x + i * size, size, total + i * groups, of, sums + i * ld, ld);
      }
      l.finish(sums, ld, 0, l.rows, first * WIDTH, least(ld, l.w.results - first * WIDTH));
    }
    release(sums), release(x), release(total);
  });
}

static void many_levels_by_floats(const ByFloats& l, int64_t threads) {
  const int64_t block = even_block(l.rows, l.block), blocks = (l.rows + block - 1) / block;
  const int64_t chunks = (l.w.results + l.chunk - 1) / l.chunk;
  const int64_t grain = grain_of(block * least(l.chunk, l.w.results) * l.w.depth);
  parallel_for(blocks * chunks, grain, threads, [=](int64_t begin, int64_t end) {
    const int64_t size = l.w.units * UNIT, ld = up(least(l.chunk, l.w.results), WIDTH);
    float* sums = scratch<float>(block * ld);
    float* b = scratch<float>(size * ld);
    float* x = scratch<float>(block * size);
    const float** rows = scratch<const float*>(block);
    Unpacked some(l.w, (l.chunk + WIDTH - 1) / WIDTH);
    int64_t unpacked = -1, held = -1;  // the chunk that is in b, the block that is in x
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / blocks, column = which * l.chunk, columns = least(l.chunk, l.w.results - column);
      const int64_t first = at % blocks * block, count = least(block, l.rows - first);
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = x + i * size;
        if (held != first) l.row(first + i, x + i * size, size);
      }
      if (unpacked != which) {
        const int64_t tiles = (columns + WIDTH - 1) / WIDTH;
        some.take(l.w, column / WIDTH, tiles);
        to_panels<8>(some.w, column / WIDTH, tiles, b);
      }
      unpacked = which, held = first;
      panels_product(rows, count, 1, size, b, columns, sums, ld);
      l.finish(sums, ld, first, count, column, columns);
    }
    release(sums), release(b), release(x), release(rows);
  });
}

}  // namespace
}  // namespace effc

EFFC_EXPORT void effc_linear_levels_by_floats(char* const* p, const int64_t* n, int64_t threads) {
  const effc::ByFloats l(p, n);
  if (l.rows == 0 || l.w.results == 0) return;
  if (l.rows <= effc::FEW) return effc::few_levels_by_floats(l, threads);
  effc::many_levels_by_floats(l, threads);
}
