// y = x w^T with w as it is stored, [results, depth] or its transpose: no second copy of a weight is
// kept. x and w are of one type, float or a 16-bit one; sums are float32.
//
// Many rows: a chunk of w is turned into panels in scratch memory and used for all rows of a block.
// Few rows: rows of w are multiplied as they lie, for the time of reading them once.
#pragma once

#include "effc_rows.h"

namespace effc {
namespace {

constexpr int64_t FEW = 32, FEW_TURNED = 8;  // rows: with more, panels in the cache pay
constexpr int64_t AT_ONCE = 4096;            // sums of few rows between two calls of the epilogue
constexpr int64_t WORTH = 128 << 10;         // bytes to read that are worth a thread: about 10 us
constexpr int64_t LINE = 16;                 // results in a line of the cache: no two threads share one

// p: y, x [rows, depth], w [results, depth], then what the epilogue reads. n: the epilogue's address,
// rows, results, depth, steps between rows of x and of w, rows of a block, columns of a chunk (whole
// panels), whether w is [depth, results]; then the epilogue's.
struct Linear {
  char* const* p;
  const int64_t* n;
  Epilogue epilogue;
  int64_t rows, results, depth, ldx, ldw;
  bool turned;

  Linear(char* const* p, const int64_t* n)
      : p(p), n(n), epilogue(reinterpret_cast<Epilogue>(n[0])), rows(n[1]), results(n[2]), depth(n[3]),
        ldx(n[4]), ldw(n[5]), turned(n[8] != 0) {}

  void finish(const float* sums, int64_t ld, int64_t row, int64_t count, int64_t column, int64_t columns) const {
    epilogue(p, n + 9, sums, ld, row, count, column, columns);
  }
};

template <class T>
static void linear_of_few(const Linear& l, int64_t threads) {
  const T* x = reinterpret_cast<const T*>(l.p[1]);
  const T* w = reinterpret_cast<const T*>(l.p[2]);
  const int64_t each = l.depth * static_cast<int64_t>(sizeof(T)) * LINE * (1 + l.rows / 8);
  const int64_t lines = (l.results + LINE - 1) / LINE;
  parallel_for(lines, 1 + WORTH / (each + 1), threads, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * LINE, last = least(end * LINE, l.results);
    const int64_t most = up(AT_ONCE / l.rows, STEP), chunks = (last - first + most - 1) / most;
    const int64_t chunk = up((last - first + chunks - 1) / chunks, LINE), ld = up(chunk, STEP);
    const int64_t lda = up(l.depth, STEP);
    float* sums = scratch<float>(l.rows * ld);
    float* rows = scratch<float>(l.rows * lda);
    for (int64_t i = 0; i < l.rows; ++i) {
      if (l.turned) to_floats(x + i * l.ldx, rows + i * lda, l.depth);
      if (!l.turned) to_lanes(x + i * l.ldx, rows + i * lda, l.depth);
    }
    for (int64_t column = first; column < last; column += chunk) {
      const int64_t columns = least(chunk, last - column);
      if (l.turned) {
        memset(sums, 0, l.rows * ld * sizeof(float));
        few_rows_turned(rows, lda, l.rows, w + column, l.ldw, l.depth, columns, sums, ld);
        for (int64_t i = 0; i < l.rows; ++i) from_lanes<T>(sums + i * ld, columns);
      } else {
        few_rows(rows, lda, l.rows, w + column * l.ldw, l.ldw, columns, l.depth, sums, ld);
      }
      l.finish(sums, ld, 0, l.rows, column, columns);
    }
    release(sums), release(rows);
  });
}

template <class T>
static void linear_of_many(const Linear& l, int64_t threads) {
  constexpr bool plain = std::is_same_v<T, float>;
  const T* x = reinterpret_cast<const T*>(l.p[1]);
  const T* w = reinterpret_cast<const T*>(l.p[2]);
  const int64_t depth = l.depth, block = even_block(l.rows, l.n[6]), chunk = l.n[7];
  const int64_t blocks = (l.rows + block - 1) / block, chunks = (l.results + chunk - 1) / chunk;
  const int64_t grain = grain_of(block * least(chunk, l.results) * depth);
  parallel_for(blocks * chunks, grain, threads, [=](int64_t begin, int64_t end) {
    const int64_t ld = up(least(chunk, l.results), WIDTH);
    float* sums = scratch<float>(block * ld);
    float* b = scratch<float>(depth * ld);
    float* floats = scratch<float>(plain ? 0 : block * depth);
    const float** rows = scratch<const float*>(block);
    int64_t packed = -1, held = -1;  // the chunk that is in b, the block that is in floats
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / blocks, column = which * chunk, columns = least(chunk, l.results - column);
      const int64_t first = at % blocks * block, count = least(block, l.rows - first);
      for (int64_t i = 0; i < count; ++i) {
        const T* row = x + (first + i) * l.ldx;
        if constexpr (plain) rows[i] = row;
        if constexpr (!plain) {
          if (held != first) to_floats(row, floats + i * depth, depth);
          rows[i] = floats + i * depth;
        }
      }
      if (packed != which && l.turned) pack_columns(w + column, l.ldw, depth, columns, b);
      if (packed != which && !l.turned) pack(w + column * l.ldw, l.ldw, columns, depth, b);
      packed = which, held = first;
      panels_product(rows, count, 1, depth, b, columns, sums, ld);
      l.finish(sums, ld, first, count, column, columns);
    }
    release(sums), release(b), release(floats), release(rows);
  });
}

template <class T>
static void linear(char* const* p, const int64_t* n, int64_t threads) {
  const Linear l(p, n);
  if (l.rows == 0 || l.results == 0) return;
  if (l.rows <= (l.turned ? FEW_TURNED : FEW)) return linear_of_few<T>(l, threads);
  linear_of_many<T>(l, threads);
}

}  // namespace
}  // namespace effc
