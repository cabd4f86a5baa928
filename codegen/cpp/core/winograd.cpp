// 3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3), channels last.
//
// 36 products for 16 results where the plain sum takes 144. The interpolation points are 0, +-3/4,
// +-3/2 and infinity instead of the usual 0, +-1, +-2: rounding errors are then as small as those of
// the plain sum. Input and results of a run of tiles stay in the second-level cache.
#include "effc_tile.h"

namespace effc {
namespace {

constexpr int OUT = 4, IN = 6, POINTS = IN * IN;
constexpr float A = 0.75f, B = 1.5f;  // the points
constexpr float A2 = A * A, B2 = B * B;

// y = B^T d, for one row or column of a tile.
EFFC_INLINE void to_points(const vec (&d)[IN], vec (&t)[IN]) {
  t[0] = (A2 * B2) * d[0] + (d[4] - (A2 + B2) * d[2]);
  const vec even_a = d[4] - B2 * d[2], odd_a = d[3] - B2 * d[1];
  t[1] = even_a + A * odd_a;
  t[2] = even_a - A * odd_a;
  const vec even_b = d[4] - A2 * d[2], odd_b = d[3] - A2 * d[1];
  t[3] = even_b + B * odd_b;
  t[4] = even_b - B * odd_b;
  t[5] = (A2 * B2) * d[1] + (d[5] - (A2 + B2) * d[3]);
}

// y = A^T m
EFFC_INLINE void from_points(const vec (&m)[IN], vec (&y)[OUT]) {
  const vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + (even_a + even_b);
  y[1] = A * odd_a + B * odd_b;
  y[2] = A2 * even_a + B2 * even_b;
  y[3] = (A2 * A) * odd_a + ((B2 * B) * odd_b + m[5]);
}

struct Image {
  int64_t height, width, channels, pad_top, pad_left, line, pixel;  // the last two: steps in memory
};

// One tile of the input, one vector of its channels, at all points. INSIDE: no pixel is padding.
// FEW: there are fewer channels than lanes.
template <bool INSIDE, bool FEW>
EFFC_INLINE void tile_to_points(const float* x, const Image& s, int64_t top, int64_t left, float* v,
                                int64_t step) {
  vec rows[IN][IN];
  const vec zero = {};
#pragma GCC unroll 6
  for (int j = 0; j < IN; ++j) {
    vec d[IN], t[IN];
    const int64_t w = left + j;
#pragma GCC unroll 6
    for (int i = 0; i < IN; ++i) {
      const int64_t h = top + i;
      const bool inside = INSIDE || (h >= 0 && h < s.height && w >= 0 && w < s.width);
      const float* at = x + h * s.line + w * s.pixel;
      if (FEW) {
        d[i] = inside ? load_part(at, s.channels) : zero;
      } else {
        d[i] = inside ? load_vec(at) : zero;
      }
    }
    to_points(d, t);
#pragma GCC unroll 6
    for (int i = 0; i < IN; ++i) rows[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < IN; ++i) {
    vec t[IN];
    to_points(rows[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < IN; ++j) store_vec(v + (i * IN + j) * step, t[j]);
  }
}

// The pixels that the tile to the right does not share with this one, a cache line of their channels:
// steps of whole pixels and lines are too irregular for the processor to foresee.
EFFC_INLINE void prefetch_next(const float* x, const Image& s, int64_t top, int64_t left) {
#pragma GCC unroll 6
  for (int i = 0; i < IN; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) {
      __builtin_prefetch(x + (top + i) * s.line + (left + IN + j) * s.pixel);
    }
  }
}

// One tile of the result, one vector of its channels, from all points.
EFFC_INLINE void tile_from_points(const float* m, int64_t step, float* y, int64_t line, int64_t pixel) {
  vec rows[OUT][IN];
#pragma GCC unroll 6
  for (int j = 0; j < IN; ++j) {
    vec d[IN], t[OUT];
#pragma GCC unroll 6
    for (int i = 0; i < IN; ++i) d[i] = load_vec(m + (i * IN + j) * step);
    from_points(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < OUT; ++i) rows[i][j] = t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < OUT; ++i) {
    vec t[OUT];
    from_points(rows[i], t);
#pragma GCC unroll 4
    for (int j = 0; j < OUT; ++j) store_vec(y + i * line + j * pixel, t[j]);
  }
}

}  // namespace
}  // namespace effc

// p: y, x [batch, height, width, channels], weights at the points [36][packed channels x results],
// then what the epilogue reads. n: the epilogue's address, batch, height, width, channels, results,
// result height, result width, steps between images, lines and pixels of x, padding above, padding
// left, tiles in a run; then the epilogue's.
EFFC_EXPORT void effc_winograd(char* const* p, const int64_t* n, int64_t threads) {
  using namespace effc;
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], channels = n[4], results = n[5], high = n[6], wide = n[7];
  const Image s = {n[2], n[3], channels, n[11], n[12], n[9], n[10]};
  const float* x = reinterpret_cast<const float*>(p[1]);
  const float* u = reinterpret_cast<const float*>(p[2]);
  const int64_t down = (high + OUT - 1) / OUT, across = (wide + OUT - 1) / OUT;
  const int64_t tiles = batch * down * across;
  if (tiles == 0 || results == 0) return;
  const int64_t each = (tiles + threads - 1) / threads;
  const int64_t run = least(n[13], up(each, TILE_ROWS)), runs = (tiles + run - 1) / run;
  const int64_t deep = up(channels, WIDTH), ld = up(results, WIDTH);
  // Steps between points are odd counts of cache lines: 36 streams then fall on as many sets.
  const int64_t step_v = up(run * deep, 16) | 16, step_m = up(run * ld, 16) | 16;
  const int64_t panels = channels * ld;  // numbers in the weights of one point
  parallel_for(runs, grain_of(run * POINTS * channels * results), threads, [=](int64_t begin, int64_t end) {
    float* v = scratch<float>(POINTS * step_v);
    float* m = scratch<float>(POINTS * step_m);
    float* y = scratch<float>(OUT * OUT * run * ld);
    const float** rows = scratch<const float*>(run);
    const int64_t line = OUT * run * ld;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at * run, count = least(run, tiles - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = first + i, image = t / (down * across), place = t % (down * across);
        const int64_t top = place / across * OUT - s.pad_top, left = place % across * OUT - s.pad_left;
        const float* source = x + image * n[8];
        const bool inside =
            top >= 0 && left >= 0 && top + IN <= s.height && left + IN <= s.width;
        for (int64_t c = 0; c < channels; c += WIDTH) {
          // The last vector overlaps the one before it rather than being filled lane by lane.
          const int64_t lane = channels < WIDTH ? 0 : least(c, channels - WIDTH);
          float* to = v + i * deep + lane;
          if (inside && c % 16 == 0) prefetch_next(source + lane, s, top, left);
          if (channels < WIDTH) {
            tile_to_points<false, true>(source, s, top, left, to, step_v);
          } else if (inside) {
            tile_to_points<true, false>(source + lane, s, top, left, to, step_v);
          } else {
            tile_to_points<false, false>(source + lane, s, top, left, to, step_v);
          }
        }
      }
      for (int64_t q = 0; q < POINTS; ++q) {
        for (int64_t i = 0; i < count; ++i) rows[i] = v + q * step_v + i * deep;
        panels_product(rows, count, 1, channels, u + q * panels, results, m + q * step_m, ld);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < results; c += WIDTH) {
          tile_from_points(m + i * ld + c, step_m, y + i * OUT * ld + c, line, ld);
        }
      }
      // Tiles beside each other give rows of pixels, which lie together in the result.
      for (int64_t i = 0; i < count;) {
        const int64_t t = first + i, column = t % across, beside = least(count - i, across - column);
        const int64_t band = t / across, image = band / down, top = band % down * OUT;
        const int64_t pixels = least(beside * OUT, wide - column * OUT);
        for (int64_t h = 0; h < least(OUT, high - top); ++h) {
          const int64_t row = (image * high + top + h) * wide + column * OUT;
          epilogue(p, n + 14, y + h * line + i * OUT * ld, ld, row, pixels, 0, results);
        }
        i += beside;
      }
    }
    release(v), release(m), release(y), release(rows);
  });
}
