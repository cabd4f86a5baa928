// Depthwise convolutions, channels last: every channel has a kernel of its own.
//
// A few neighbouring result pixels are summed at once, a vector of channels at a time, so that a
// weight is loaded once for all of them. What bounds it is how fast the image is read and written.
#include "effc_tile.h"

namespace effc {
namespace {

constexpr int TOGETHER = 4;  // result pixels

struct Window {
  int64_t height, width, channels, tall, broad, stride_h, stride_w, pad_h, pad_w, step_h, step_w,
      line, pixel;  // the last two: steps in memory
};

// COUNT pixels of a line from column w on, all kernel columns inside the image; rows [i, stop) of the
// kernel are inside. FEW: fewer channels than lanes.
template <int COUNT, bool FEW>
EFFC_INLINE void any_pixels(const float* x, const Window& s, int64_t top, int64_t left, int64_t i, int64_t stop,
                        const float* weight, int64_t c, float* to, int64_t ld) {
  vec sums[COUNT] = {};
  for (; i < stop; ++i) {
    const float* from = x + (top + i * s.step_h) * s.line + left * s.pixel + c;
    const float* w = weight + i * s.broad * s.channels + c;
    for (int64_t j = 0; j < s.broad; ++j, from += s.step_w * s.pixel, w += s.channels) {
      const vec right = FEW ? load_part(w, s.channels) : load_vec(w);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q) {
        const float* at = from + q * s.stride_w * s.pixel;
        sums[q] += right * (FEW ? load_part(at, s.channels) : load_vec(at));
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < COUNT; ++q) store_vec(to + q * ld + c, sums[q]);
}

// The same for kernels of three columns, STRIDE apart and next to each other: each pixel is loaded once
// for all the results it takes part in.
template <int COUNT, int STRIDE>
EFFC_INLINE void three_columns(const float* x, const Window& s, int64_t top, int64_t left, int64_t i,
                               int64_t stop, const float* weight, int64_t c, float* to, int64_t ld) {
  constexpr int READ = (COUNT - 1) * STRIDE + 3;
  vec sums[COUNT] = {};
  for (; i < stop; ++i) {
    const float* from = x + (top + i * s.step_h) * s.line + left * s.pixel + c;
    const float* w = weight + i * 3 * s.channels + c;
    const vec w0 = load_vec(w), w1 = load_vec(w + s.channels), w2 = load_vec(w + 2 * s.channels);
#pragma GCC unroll 16
    for (int r = 0; r < READ; ++r) {
      const vec v = load_vec(from + r * s.pixel);
      if (r % STRIDE == 0 && r / STRIDE < COUNT) sums[r / STRIDE] += w0 * v;
      if (r >= 1 && (r - 1) % STRIDE == 0 && (r - 1) / STRIDE < COUNT) sums[(r - 1) / STRIDE] += w1 * v;
      if (r >= 2 && (r - 2) % STRIDE == 0 && (r - 2) / STRIDE < COUNT) sums[(r - 2) / STRIDE] += w2 * v;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < COUNT; ++q) store_vec(to + q * ld + c, sums[q]);
}

template <int COUNT, bool FEW>
EFFC_INLINE void pixels(const float* x, const Window& s, int64_t top, int64_t left, int64_t i, int64_t stop,
                        const float* weight, int64_t c, float* to, int64_t ld) {
  if (!FEW && s.broad == 3 && s.step_w == 1 && s.stride_w == 1) {
    three_columns<COUNT, 1>(x, s, top, left, i, stop, weight, c, to, ld);
  } else if (!FEW && s.broad == 3 && s.step_w == 1 && s.stride_w == 2) {
    three_columns<COUNT, 2>(x, s, top, left, i, stop, weight, c, to, ld);
  } else {
    any_pixels<COUNT, FEW>(x, s, top, left, i, stop, weight, c, to, ld);
  }
}

// One pixel whose kernel reaches over an edge of the image.
EFFC_INLINE void edge(const float* x, const Window& s, int64_t top, int64_t left, int64_t i, int64_t stop,
                      const float* weight, float* to) {
  for (int64_t c = 0; c < s.channels; ++c) to[c] = 0;
  for (; i < stop; ++i) {
    for (int64_t j = 0; j < s.broad; ++j) {
      const int64_t z = left + j * s.step_w;
      if (z < 0 || z >= s.width) continue;
      const float* from = x + (top + i * s.step_h) * s.line + z * s.pixel;
      const float* w = weight + (i * s.broad + j) * s.channels;
#pragma omp simd
      for (int64_t c = 0; c < s.channels; ++c) to[c] += from[c] * w[c];
    }
  }
}

template <int COUNT>
EFFC_INLINE void channels(const float* x, const Window& s, int64_t top, int64_t left, int64_t i, int64_t stop,
                          const float* weight, float* to, int64_t ld) {
  if (s.channels < WIDTH) {
    pixels<COUNT, true>(x, s, top, left, i, stop, weight, 0, to, ld);
    return;
  }
  for (int64_t c = 0; c < s.channels; c += WIDTH) {  // the last vector overlaps the one before it
    pixels<COUNT, false>(x, s, top, left, i, stop, weight, least(c, s.channels - WIDTH), to, ld);
  }
}

}  // namespace
}  // namespace effc

// p: y, x [batch, height, width, channels], weights [kernel height, kernel width, channels], then what
// the epilogue reads. n: the epilogue's address, batch, height, width, channels, results (the same),
// result height, result width, steps between images, lines and pixels of x, kernel, stride, padding,
// dilation (two each); then the epilogue's.
EFFC_EXPORT void effc_depthwise(char* const* p, const int64_t* n, int64_t threads) {
  using namespace effc;
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], high = n[6], wide = n[7];
  const Window s = {n[2],  n[3],  n[4],  n[11], n[12], n[13], n[14], n[15],
                    n[16], n[17], n[18], n[9],  n[10]};
  const float* x = reinterpret_cast<const float*>(p[1]);
  const float* weight = reinterpret_cast<const float*>(p[2]);
  if (wide == 0 || s.channels == 0) return;
  const int64_t ld = up(s.channels, WIDTH);
  const int64_t reach = (s.broad - 1) * s.step_w;
  parallel_for(batch * high, grain_of(wide * ld * s.tall * s.broad), threads, [=](int64_t begin, int64_t end) {
    // As many pixels at a time as stay in the first-level cache until the epilogue reads them.
    const int64_t block = least(wide, up(1 + 4096 / ld, TOGETHER));
    float* sums = scratch<float>(block * ld);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / high, top = line % high * s.stride_h - s.pad_h;
      const float* source = x + image * n[8];
      int64_t first = 0, stop = s.tall;  // rows of the kernel inside the image
      while (first < stop && top + first * s.step_h < 0) ++first;
      while (stop > first && top + (stop - 1) * s.step_h >= s.height) --stop;
      for (int64_t w = 0; w < wide; w += block) {
        const int64_t count = least(block, wide - w);
        for (int64_t q = 0; q < count;) {
          const int64_t left = (w + q) * s.stride_w - s.pad_w;
          const int64_t last = left + (TOGETHER - 1) * s.stride_w + reach;
          float* to = sums + q * ld;
          if (left >= 0 && last < s.width && q + TOGETHER <= count) {
            channels<TOGETHER>(source, s, top, left, first, stop, weight, to, ld);
            q += TOGETHER;
          } else if (left >= 0 && left + reach < s.width) {
            channels<1>(source, s, top, left, first, stop, weight, to, ld);
            ++q;
          } else {
            edge(source, s, top, left, first, stop, weight, to);
            ++q;
          }
        }
        epilogue(p, n + 19, sums, ld, line * wide + w, count, 0, s.channels);
      }
    }
    release(sums);
  });
}
