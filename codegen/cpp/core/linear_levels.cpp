// x w^T of codes of five levels (effc_levels.h) with codes of 8 bits or fewer: see effc_codes_linear.h for what p and n
// are; w's are in bundles.
#include "effc_codes_linear.h"
#include "effc_levels.h"

namespace effc {
namespace {

// Sums over a bundle's units, with those of a row of x. SOME: not all of its units are there, `held` are.
template <bool SOME>
EFFC_INLINE void add_bundle(const uint8_t* bundle, const int8_t* x, int held, sums32 (&sums)[FIVE]) {
  sums16 some[FIVE] = {};  // 8 times two products of 4 and 128 fit
  each_vector(bundle, [&](int j, int d, shorts v) {
    if (!SOME || d < held) some[d] += pair_products(v, four_codes(x + d * UNIT + j * RUN));
  });
#pragma GCC unroll 5
  for (int d = 0; d < FIVE; ++d) sums[d] = pair_sums(some[d]);
}

// A row of x with WIDTH rows of w, without unpacking these to memory.
static void one_row(const Weight& w, const Codes& x, int64_t tile, float* to) {
  const uint8_t *bundle = w.codes + tile * ((x.units + FIVE - 1) / FIVE) * BUNDLE_BYTES, *zeros = w.zeros_of(tile);
  vec result = {};
  sums32 sum = {};
  int64_t s = 0, end = least(x.step, x.units);
  for (int64_t u = 0; u < x.units; bundle += BUNDLE_BYTES) {
    const int held = static_cast<int>(least(FIVE, x.units - u));
    sums32 sums[FIVE];
    __builtin_prefetch(bundle + 4 * BUNDLE_BYTES);
    if (EFFC_LIKELY(held == FIVE)) add_bundle<false>(bundle, x.codes + u * UNIT, held, sums);
    if (EFFC_UNLIKELY(held != FIVE)) add_bundle<true>(bundle, x.codes + u * UNIT, held, sums);
#pragma GCC unroll 5
    for (int d = 0; d < FIVE; ++d) {
      if (d >= held) break;
      sum += sums[d];
      if (++u != end) continue;
      const int64_t group = (u - 1) / w.group * WIDTH;
      const int32_t total = x.total[s];
      const sums32 made = sum - (zeros ? zeros_at(zeros + group) * total : total - sums32{});
      const vec scale = w.scales_at(tile * w.groups * WIDTH + group);
      result += __builtin_convertvector(made, vec) * (x.each ? scale * x.scale[s] : scale);
      sum = sums32{}, ++s, end = least(u + x.step, x.units);
    }
  }
  store_vec(to, x.each ? result : result * x.scale[0]);
}

static void one_of_levels(const OfCodes& l, int64_t threads) {
  const int64_t each = l.w.units * BUNDLE_BYTES / FIVE;
  parallel_for(l.w.tiles(), 1 + WORTH / (each + 1), threads, [=](int64_t begin, int64_t end) {
    constexpr int64_t MOST = AT_ONCE / WIDTH;
    float* sums = scratch<float>(AT_ONCE);
    const Prepared prepared(l, 1);
    const Codes x = prepared.rows(l, 0, 1);
    for (int64_t first = begin; first < end; first += MOST) {
      const int64_t count = least(MOST, end - first), column = first * WIDTH;
      for (int64_t t = 0; t < count; ++t) one_row(l.w, x, first + t, sums + t * WIDTH);
      l.finish(sums, AT_ONCE, 0, 1, column, least(count * WIDTH, l.w.results - column));
    }
    release(sums);
  });
}

// All rows of a block with two tiles of w that are unpacked.
static void all_rows(const Weight& w, const Codes& x, int64_t rows, const Tiles<2>& of, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t row = rows < 4 ? i : least(i, rows - 4);  // the last four begin earlier
    if (rows >= 4) products<LEVEL_BITS, 8, 4>(w, x.from(row), of, to + row * ld, ld);
    if (rows == 3) products<LEVEL_BITS, 8, 3>(w, x.from(row), of, to + row * ld, ld);
    if (rows == 2) products<LEVEL_BITS, 8, 2>(w, x.from(row), of, to + row * ld, ld);
  }
}

static void many_of_levels(const OfCodes& l, int64_t threads) {
  const Weight& w = l.w;
  const int64_t block = least(l.rows, even_block(l.rows, l.block)), blocks = (l.rows + block - 1) / block;
  const int64_t chunks = (w.tiles() + CHUNK - 1) / CHUNK, bundles = (w.units + FIVE - 1) / FIVE;
  const int64_t grain = grain_of(block * CHUNK * WIDTH * w.depth / 4);
  parallel_for(blocks * chunks, grain, threads, [=](int64_t begin, int64_t end) {
    const Weight& w = l.w;
    const int64_t ld = CHUNK * WIDTH, size = w.units * UNIT_BYTES<8>;
    float* sums = scratch<float>(block * ld);
    uint8_t* codes = scratch<uint8_t>(2 * size);
    const Prepared prepared(l, block);
    Codes x = {};
    int64_t held = -1;  // the block that is prepared
    for (int64_t at = begin; at < end; ++at) {
      const int64_t tile = at % chunks * CHUNK, tiles = least(CHUNK, w.tiles() - tile);
      // A last block of one row begins one earlier.
      const int64_t first = least(at / chunks * block, l.rows - 2), rows = least(block, l.rows - first);
      if (held != first) x = prepared.rows(l, first, rows);
      held = first;
      Tiles<2> of;
      for (int64_t t = 0; t < tiles; t += 2) {
        for (int q = 0; q < 2; ++q) {
          const int64_t which = tile + least(t + q, tiles - 1);  // a last one alone is computed twice
          unpack_levels(w.codes + which * bundles * BUNDLE_BYTES, w.units, codes + q * size);
          of.codes[q] = codes + q * size, of.zero[q] = w.zeros_of(which);
          of.scale[q] = which * w.groups * WIDTH, of.column[q] = (which - tile) * WIDTH;
        }
        all_rows(w, x, rows, of, sums, ld);
      }
      l.finish(sums, ld, first, rows, tile * WIDTH, least(tiles * WIDTH, w.results - tile * WIDTH));
    }
    release(sums), release(codes);
  });
}

}  // namespace
}  // namespace effc

EFFC_EXPORT void effc_linear_levels(char* const* p, const int64_t* n, int64_t threads) {
  const effc::OfCodes l(p, n);
  if (l.rows == 0 || l.w.results == 0) return;
  if (l.rows == 1) return effc::one_of_levels(l, threads);
  effc::many_of_levels(l, threads);
}
