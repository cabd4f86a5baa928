// New rows of sequences, written into the pages that a table names for them.
#include "effc_tile.h"

// p: pool, new, table, start, error word. n: bytes of a row, batch, heads, new rows, steps in bytes between
// batches, heads and rows of new and between pages, heads and rows of the pool; rows of a page, pages of
// each sequence, the step between sequences in the table, pages of the pool.
EFFC_EXPORT void effc_update_pages(char* const* p, const int64_t* n, int64_t) {
  const int64_t bytes = n[0], batch = n[1], heads = n[2], rows = n[3], page = n[10];
  const int64_t* table = reinterpret_cast<const int64_t*>(p[2]);
  const int64_t start = *reinterpret_cast<const int64_t*>(p[3]);
  int64_t* error = reinterpret_cast<int64_t*>(p[4]);
  if (start < 0 || start > n[11] * page - rows) return void(*error = 1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = start / page; i * page < start + rows; ++i) {
      const int64_t at = table[b * n[12] + i];
      if (at < 0 || at >= n[13]) return void(*error = 1);  // before anything is written
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = table[b * n[12] + (start + r) / page], row = (start + r) % page;
      for (int64_t h = 0; h < heads; ++h) {
        memcpy(p[0] + at * n[7] + h * n[8] + row * n[9], p[1] + b * n[4] + h * n[5] + r * n[6], bytes);
      }
    }
  }
}
