// Convolutions as matrix products over pixels, channels last: any kernel, stride, padding, dilation.
//
// A row of A is one result pixel. Where an input pixel holds enough channels, the row is a list of
// pointers to the pixels under the kernel, with a row of zeros for padding: nothing is copied. Else
// (the first layer of a network) the pixels of a block of rows are gathered side by side first.
#include "effc_tile.h"

namespace effc {
namespace {

struct Window {
  int64_t height, width, channels, tall, broad, stride_h, stride_w, pad_h, pad_w, step_h, step_w,
      line, pixel;  // the last two: steps in memory
};

// Pointers to the pixels under the kernel at one place; `nothing` stands for those outside.
EFFC_INLINE void point(const float* x, const Window& s, int64_t h, int64_t w, const float* nothing,
                       const float** to) {
  const int64_t top = h * s.stride_h - s.pad_h, left = w * s.stride_w - s.pad_w;
  for (int64_t i = 0; i < s.tall; ++i) {
    const int64_t y = top + i * s.step_h;
    const bool inside = y >= 0 && y < s.height;
    for (int64_t j = 0; j < s.broad; ++j) {
      const int64_t z = left + j * s.step_w;
      *to++ = inside && z >= 0 && z < s.width ? x + y * s.line + z * s.pixel : nothing;
    }
  }
}

// The pixels under the kernel at one place, copied side by side. Those of one kernel row lie together
// in the input unless some are skipped.
EFFC_INLINE void gather(const float* x, const Window& s, int64_t h, int64_t w, float* to) {
  const int64_t top = h * s.stride_h - s.pad_h, left = w * s.stride_w - s.pad_w, run = s.broad * s.channels;
  const bool together =
      s.step_w == 1 && s.pixel == s.channels && left >= 0 && left + s.broad <= s.width;
  for (int64_t i = 0; i < s.tall; ++i, to += run) {
    const int64_t y = top + i * s.step_h;
    if (y < 0 || y >= s.height) {
      for (int64_t c = 0; c < run; ++c) to[c] = 0;
    } else if (together) {
      const float* from = x + y * s.line + left * s.pixel;
      int64_t c = 0;
      for (; c + WIDTH <= run; c += WIDTH) store_vec(to + c, load_vec(from + c));
      for (; c < run; ++c) to[c] = from[c];
    } else {
      for (int64_t j = 0; j < s.broad; ++j) {
        const int64_t z = left + j * s.step_w;
        const bool inside = z >= 0 && z < s.width;
        const float* from = x + y * s.line + z * s.pixel;
        for (int64_t c = 0; c < s.channels; ++c) to[j * s.channels + c] = inside ? from[c] : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace effc

// p: y, x [batch, height, width, channels], packed weights [kernel height, kernel width, channels] x
// results, then what the epilogue reads. n: the epilogue's address, batch, height, width, channels,
// results, result height, result width, steps between images, lines and pixels of x, kernel, stride,
// padding, dilation (two each), rows of a block, columns of a chunk (whole panels), gather; then the
// epilogue's.
EFFC_EXPORT void effc_convolution(char* const* p, const int64_t* n, int64_t threads) {
  using namespace effc;
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], results = n[5], high = n[6], wide = n[7];
  const Window s = {n[2], n[3], n[4], n[11], n[12], n[13], n[14], n[15], n[16],
                    n[17], n[18], n[9],  n[10]};
  const int64_t chunk = n[20];
  const bool gathered = n[21] != 0;
  const float* x = reinterpret_cast<const float*>(p[1]);
  const float* b = reinterpret_cast<const float*>(p[2]);
  const int64_t taps = s.tall * s.broad, depth = taps * s.channels;
  const int64_t pixels = batch * high * wide;
  if (pixels == 0 || results == 0) return;
  // Every result pixel reads one input pixel, and these follow each other in memory.
  const bool flat = !gathered && taps == 1 && high == s.height && wide == s.width && s.stride_h == 1 && s.stride_w == 1 &&
                    s.pad_h == 0 && s.pad_w == 0 && s.line == wide * s.pixel && n[8] == high * s.line;
  const int64_t block = even_block(pixels, least(n[19], (pixels + threads - 1) / threads));
  const int64_t blocks = (pixels + block - 1) / block;
  const int64_t chunks = (results + chunk - 1) / chunk;
  parallel_for(blocks * chunks, grain_of(block * least(chunk, results) * depth), threads, [=](int64_t begin, int64_t end) {
    const int64_t ld = up(least(chunk, results), WIDTH);
    float* sums = scratch<float>(block * ld);
    const float** under = scratch<const float*>(block * taps);
    float* nothing = scratch<float>(s.channels);
    float* beside = scratch<float>(gathered ? block * depth : 1);
    memset(nothing, 0, s.channels * sizeof(float));
    int64_t filled = -1;  // the block whose pointers are there
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / chunks, first = which * block, count = least(block, pixels - first);
      const int64_t column = at % chunks * chunk, columns = least(chunk, results - column);
      if (filled != which) {
        if (flat) {
          for (int64_t i = 0; i < count; ++i) under[i] = x + (first + i) * s.pixel;
        } else {
          int64_t w = first % wide, h = first / wide % high, image = first / (wide * high);
          for (int64_t i = 0; i < count; ++i) {
            const float* source = x + image * n[8];
            if (gathered) {
              under[i] = beside + i * depth;
              gather(source, s, h, w, beside + i * depth);
            } else {
              point(source, s, h, w, nothing, under + i * taps);
            }
            if (++w == wide) {
              w = 0;
              if (++h == high) h = 0, ++image;
            }
          }
        }
        filled = which;
      }
      const float* packed = b + depth * column;  // panels are whole up to the last column
      const int64_t pieces = gathered ? 1 : taps;
      panels_product(under, count, pieces, depth / pieces, packed, columns, sums, ld);
      epilogue(p, n + 22, sums, ld, first, count, column, columns);
    }
    release(sums), release(under), release(nothing), release(beside);
  });
}
