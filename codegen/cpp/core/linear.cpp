// y = x w^T with w as it is stored, [results, depth] or its transpose: no second copy of a weight is
// kept.
//
// Many rows: a chunk of w is turned into panels in scratch memory and used for all rows of a block.
// Few rows: rows of x and of w are multiplied along depth, several at a time, as both lie.
#include "effc_rows.h"

// p: y, x [rows, depth], w [results, depth], then what the epilogue reads. n: the epilogue's address,
// rows, results, depth, steps between rows of x and of w, rows of a block, columns of a chunk (whole
// panels), whether w is [depth, results]; then the epilogue's.
EFFC_EXPORT void effc_linear(char* const* p, const int64_t* n, int64_t threads) {
  using namespace effc;
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t total_rows = n[1], results = n[2], depth = n[3], ldx = n[4], ldw = n[5];
  const int64_t chunk = n[7];
  const bool turned = n[8] != 0, few = !turned && total_rows <= 32 && depth >= 8 * WIDTH;
  const bool as_it_lies = turned && total_rows <= 4 && results % WIDTH == 0;
  if (total_rows == 0 || results == 0) return;
  const float* x = reinterpret_cast<const float*>(p[1]);
  const float* w = reinterpret_cast<const float*>(p[2]);
  const int64_t block = even_block(total_rows, n[6]);
  const int64_t blocks = (total_rows + block - 1) / block, chunks = (results + chunk - 1) / chunk;
  parallel_for(blocks * chunks, grain_of(block * least(chunk, results) * depth), threads, [=](int64_t begin, int64_t end) {
    const int64_t ld = up(least(chunk, results), WIDTH);
    float* sums = scratch<float>(block * ld);
    float* b = scratch<float>(few || as_it_lies ? 1 : depth * ld);
    const float** rows = scratch<const float*>(block);
    int64_t packed = -1;  // the chunk that is in b
    for (int64_t at = begin; at < end; ++at) {
      const int64_t which = at / blocks, column = which * chunk, columns = least(chunk, results - column);
      const int64_t first = at % blocks * block, count = least(block, total_rows - first);
      const float* source = x + first * ldx;
      if (few) {
        few_rows(source, ldx, count, w + column * ldw, ldw, columns, depth, sums, ld);
      } else {
        for (int64_t i = 0; i < count; ++i) rows[i] = source + i * ldx;
        if (as_it_lies) {
          rows_product(rows, count, depth, w + column, ldw, columns, sums, ld, false);
        } else {
          if (packed != which && turned) pack_columns(w + column, ldw, depth, columns, b);
          if (packed != which && !turned) pack(w + column * ldw, ldw, columns, depth, b);
          packed = which;
          panels_product(rows, count, 1, depth, b, columns, sums, ld);
        }
      }
      epilogue(p, n + 9, sums, ld, first, count, column, columns);
    }
    release(sums), release(b), release(rows);
  });
}
