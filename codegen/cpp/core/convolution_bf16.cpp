// Convolutions on AMX, channels last: any kernel, stride, padding, dilation. A linear layer is one of
// 1x1 over a picture of one line, whose pixels are its rows.
//
// The input under a block of result pixels is copied once, as bf16, into scratch memory that stays in
// the second-level cache: padded with zeros, channels up to whole steps of a tile. Pixels are sorted
// by their place modulo the stride, each kind in a picture of its own. There the pixels under one
// kernel place lie side by side for neighbouring results, line after line: sixteen of them are a tile
// as it lies. Results at the seam between two lines are computed and dropped.
//
// With few channels the pixels of a line of the kernel are put together in one (`together`).
#include "effc_amx.h"

namespace effc {
namespace {

using amx::DEEP;
using amx::ROWS;
constexpr int64_t PAIR = 2 * ROWS;  // rows of a block of tiles

struct Window {
  int64_t height, width, channels, tall, broad, stride_h, stride_w, pad_h, pad_w, step_h, step_w,
      line, pixel;   // the last two: steps in memory
  int64_t together;  // pixels of the input that make one of the copy
};

// A block of results, `lines` x `width`, and the copy of what it reads.
struct Block {
  int64_t lines, width;
  int64_t kinds_h, kinds_w;  // pictures in the copy
  int64_t rows, columns;     // of each
  int64_t deep, pixel;       // numbers of a pixel, and steps between pixels
  int64_t count, part;       // numbers of one part, and between parts
  int64_t span;              // rows of sums from one line of results to the next
};

EFFC_INLINE int64_t parts_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

EFFC_INLINE Block block_of(const Window& s, int64_t lines, int64_t width) {
  Block b;
  b.lines = lines, b.width = width;
  b.kinds_h = s.stride_h, b.kinds_w = s.together > 1 ? 1 : s.stride_w;
  b.rows = lines + (s.tall - 1) * s.step_h / s.stride_h;
  b.columns = width + (s.together > 1 ? 0 : (s.broad - 1) * s.step_w / s.stride_w);
  b.deep = up(s.together * s.channels, DEEP);
  // Steps of whole KiB would put the rows of a tile into few sets of the first-level cache.
  b.pixel = b.deep + (b.deep % 512 ? 0 : DEEP);
  b.count = b.kinds_h * b.kinds_w * b.rows * b.columns * b.pixel;
  b.part = b.count + ROWS * b.pixel;  // the last tile reads on behind the last pixel
  b.span = least(b.columns, up(width, ROWS));
  return b;
}

// Whether a kernel of `taps` places, `step` apart, reads pixels of this kind.
EFFC_INLINE bool reads(int64_t kind, int64_t taps, int64_t step, int64_t stride) {
  for (int64_t i = 0; i < taps; ++i) {
    if (i * step % stride == kind) return true;
  }
  return false;
}

// One pixel of the copy: that at column z of a line of the input, and those the kernel puts beside it.
template <int PARTS, class T>
EFFC_INLINE void copy_pixel(const T* line, const Window& s, int64_t z, T* beside, uint16_t* to, const Block& b) {
  if (s.together == 1) {
    if (z >= 0 && z < s.width) {
      amx::split_row<PARTS>(line + z * s.pixel, s.channels, to, b.part);
      return;
    }
  } else {
    T* at = beside;
    for (int64_t j = 0; j < s.together; ++j, z += s.step_w) {
      const bool inside = z >= 0 && z < s.width;
      for (int64_t c = 0; c < s.channels; ++c) *at++ = inside ? line[z * s.pixel + c] : T();
    }
    amx::split_row<PARTS>(beside, s.together * s.channels, to, b.part);
    return;
  }
  memset(to, 0, b.deep * sizeof(*to));
  if (PARTS == 2) memset(to + b.part, 0, b.deep * sizeof(*to));
}

// What the results [top, top + lines) x [left, left + b.width) read.
template <int PARTS, class T>
static void copy(const T* x, const Window& s, const Block& b, int64_t top, int64_t lines, int64_t left, T* beside,
                 uint16_t* to) {
  const int64_t taps_w = s.together > 1 ? 1 : s.broad, rows = b.rows - b.lines + lines;
  for (int64_t i = 0; i < b.kinds_h; ++i) {
    for (int64_t j = 0; j < b.kinds_w; ++j, to += b.rows * b.columns * b.pixel) {
      if (!reads(i, s.tall, s.step_h, s.stride_h) || !reads(j, taps_w, s.step_w, s.stride_w)) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t y = (top + r) * s.stride_h + i - s.pad_h;
        uint16_t* row = to + r * b.columns * b.pixel;
        if (y < 0 || y >= s.height) {
          memset(row, 0, b.columns * b.pixel * sizeof(*row));
          if (PARTS == 2) memset(row + b.part, 0, b.columns * b.pixel * sizeof(*row));
          continue;
        }
        for (int64_t v = 0; v < b.columns; ++v) {
          const int64_t z = (left + v) * s.stride_w + j - s.pad_w;
          copy_pixel<PARTS>(x + y * s.line, s, z, beside, row + v * b.pixel, b);
        }
      }
    }
  }
}

// Where each step of the products finds its numbers, from the place of a result in the copy.
EFFC_INLINE void steps_of(const Window& s, const Block& b, int64_t* to) {
  for (int64_t i = 0; i < s.tall; ++i) {
    for (int64_t j = 0; j < (s.together > 1 ? 1 : s.broad); ++j) {
      const int64_t y = i * s.step_h, z = j * s.step_w;
      const int64_t kind = y % s.stride_h * b.kinds_w + z % s.stride_w;
      const int64_t row = kind * b.rows + y / s.stride_h;
      for (int64_t k = 0; k < b.deep; k += DEEP) *to++ = (row * b.columns + z / s.stride_w) * b.pixel + k;
    }
  }
}

// As many results together as leave their copy and sums in `room` bytes, and work for all threads.
static Block fitting(const Window& s, int64_t high, int64_t wide, int64_t parts, int64_t ld, int64_t room,
                     int64_t others, int64_t threads) {
  constexpr int64_t FEWEST = 64, MOST = 256;  // of a line: weights, and what surrounds it, are read again
  const auto bytes = [=](int64_t lines, int64_t width) {
    const Block b = block_of(s, lines, width);
    return b.count * parts * int64_t(sizeof(uint16_t)) + lines * b.span * ld * int64_t(sizeof(float));
  };
  int64_t width = least(wide, MOST), lines = 1;
  while (width > FEWEST && bytes(1, width) > room) width = up(width / 2, PAIR);
  width = parts_of(wide, parts_of(wide, width));
  if (width < wide) width = least(wide, up(width, PAIR));
  while (lines < high && bytes(lines + 1, width) <= room) ++lines;
  const int64_t strips = parts_of(wide, width);
  lines = least(lines, parts_of(high, parts_of(threads, others * strips)));
  lines = parts_of(high, parts_of(high, lines));
  const int64_t bands = parts_of(high, lines);
  if (others * strips * bands < threads) {
    width = least(width, up(parts_of(wide, parts_of(threads, others * bands)), PAIR));
  }
  return block_of(s, lines, width);
}

template <int PARTS, class T>
static void run(char* const* p, const int64_t* n, int64_t threads) {
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], results = n[5], high = n[6], wide = n[7];
  const Window s = {n[2],  n[3],  n[4],  n[11], n[12], n[13], n[14],
                    n[15], n[16], n[17], n[18], n[9],  n[10], n[20]};
  const int64_t chunk = n[19];
  if (batch == 0 || high == 0 || wide == 0 || results == 0) return;
  const T* x = reinterpret_cast<const T*>(p[1]);
  const uint16_t* w = reinterpret_cast<const uint16_t*>(p[2]);
  const int64_t ld = up(least(chunk, results), amx::COLUMNS), chunks = parts_of(results, chunk);
  const Block b = fitting(s, high, wide, PARTS, ld, n[21], batch * chunks, threads);
  const int64_t bands = parts_of(high, b.lines), strips = parts_of(wide, b.width);
  const int64_t steps = s.tall * (s.together > 1 ? 1 : s.broad) * (b.deep / DEEP);
  const int64_t across = parts_of(b.span, ROWS);  // tiles of a line, where lines are apart
  const bool apart = b.span != b.columns;
  const int64_t most = apart ? b.lines * across : parts_of(b.lines * b.span, ROWS);
  const int64_t work = b.lines * b.width * least(chunk, results) * steps * DEEP * PARTS;
  parallel_for(batch * bands * strips * chunks, grain_of(work / 8), threads, [=](int64_t begin, int64_t end) {
    uint16_t* copied = scratch<uint16_t>(PARTS * b.part);
    float* sums = scratch<float>(most * ROWS * ld);
    T* beside = scratch<T>(b.deep);
    int64_t* offsets = scratch<int64_t>(steps);
    const uint16_t** rows = scratch<const uint16_t*>(most);
    steps_of(s, b, offsets);
    for (int64_t i = 0; i < most; ++i) {
      rows[i] = copied + (apart ? i / across * b.columns + i % across * ROWS : i * ROWS) * b.pixel;
    }
    amx::begin();
    int64_t filled = -1;  // the block that is copied
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / chunks, strip = which % strips, band = which / strips % bands;
      const int64_t image = which / strips / bands, top = band * b.lines, left = strip * b.width;
      const int64_t lines = least(b.lines, high - top), width = least(b.width, wide - left);
      const int64_t column = at % chunks * chunk, columns = least(chunk, results - column);
      if (filled != which) copy<PARTS>(x + image * n[8], s, b, top, lines, left, beside, copied);
      filled = which;
      const int64_t count = apart ? lines * across : parts_of((lines - 1) * b.span + width, ROWS);
      const uint16_t* packed = w + column / amx::COLUMNS * steps * PARTS * amx::NUMBERS;
      amx::tiles_product<PARTS>(rows, count, b.pixel * sizeof(uint16_t), b.part, offsets, steps, packed, columns,
                                sums, ld);
      const int64_t first = (image * high + top) * wide + left;
      if (b.span == wide) {  // no seams: the lines follow each other
        epilogue(p, n + 23, sums, ld, first, lines * wide, column, columns);
        continue;
      }
      for (int64_t h = 0; h < lines; ++h) {
        epilogue(p, n + 23, sums + h * b.span * ld, ld, first + h * wide, width, column, columns);
      }
    }
    amx::end();
    release(copied), release(sums), release(beside), release(offsets), release(rows);
  });
}

}  // namespace
}  // namespace effc

// p: y, x [batch, height, width, channels], weights in tiles, then what the epilogue reads. n: the
// epilogue's address, batch, height, width, channels, results, result height, result width, steps
// between images, lines and pixels of x, kernel, stride, padding, dilation (two each), columns of a
// chunk (whole panels), pixels together, bytes of cache to stay in, parts of an operand (0: x is bf16
// itself); then the epilogue's.
EFFC_EXPORT void effc_convolution_bf16(char* const* p, const int64_t* n, int64_t threads) {
  const auto run = n[22] == 0 ? effc::run<1, effc::bf16> : n[22] == 1 ? effc::run<1, float> : effc::run<2, float>;
  run(p, n, threads);
}
