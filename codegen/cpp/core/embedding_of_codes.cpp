// Rows of a table of codes of @BITS@ bits by index: see effc_codes.h for how they lie.
#include "effc_codes_weight.h"

namespace effc {
namespace {

template <class T, class Id>
static void embedding_of_codes(char* const* p, const int64_t* n, int64_t threads) {
  const Weight w(p[3], p[4], p[5], n[1], n[2], n[3], n[4], n[5], n[6] != 0);
  const Id* ids = reinterpret_cast<const Id*>(p[2]);
  T* y = reinterpret_cast<T*>(p[0]);
  int64_t* error = reinterpret_cast<int64_t*>(p[1]);
  parallel_for(n[0], 1 + 8192 / (w.depth + 1), threads, [=](int64_t begin, int64_t end) {
    float* row = scratch<float>(w.units * UNIT);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = ids[i];
      if (EFFC_UNLIKELY(id < 0 || id >= w.results)) {
        *error = 1;
        continue;
      }
      const int64_t tile = id / WIDTH, lane = id % WIDTH;
      const uint8_t* unit = w.codes_of<@BITS@>(tile);
      for (int64_t u = 0; u < w.units; ++u, unit += UNIT_BYTES<@BITS@>) {
        const int64_t at = u / w.group * WIDTH + lane;
        float scale;
        floats_of_kind(w.kind, w.scale, tile * w.groups * WIDTH + at, &scale, 1);
        const int64_t zero = w.zero ? w.zeros_of(tile)[at] : w.offset;
        for (int j = 0; j < RUNS; ++j) {
          const uint32_t four = unpack_one<@BITS@>(unit, j, lane);
          for (int e = 0; e < RUN; ++e) {
            const int64_t code = four >> 8 * e & 0xff;
            row[u * UNIT + j * RUN + e] = static_cast<float>(code - zero) * scale;
          }
        }
      }
      for (int64_t k = 0; k < w.depth; ++k) store(y + i * w.depth + k, row[k]);
    }
    release(row);
  });
}

template <class T>
static void embedding_of_codes(char* const* p, const int64_t* n, int64_t threads) {
  if (n[8]) return embedding_of_codes<T, int64_t>(p, n, threads);
  embedding_of_codes<T, int32_t>(p, n, threads);
}

}  // namespace
}  // namespace effc

// p: y, the error word, ids, codes, scale, zero. n: how many ids; rows and columns of the table; units of a group,
// or 0 for a whole row; the type of scales; what zeros are where there are none, and whether there are; the type
// of y (float, half, bfloat16); whether ids are of 64 bits.
EFFC_EXPORT void effc_embedding_of_codes@BITS@(char* const* p, const int64_t* n, int64_t threads) {
  if (n[7] == 0) effc::embedding_of_codes<float>(p, n, threads);
  if (n[7] == 1) effc::embedding_of_codes<effc::half>(p, n, threads);
  if (n[7] == 2) effc::embedding_of_codes<effc::bf16>(p, n, threads);
}
