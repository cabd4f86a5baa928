// softmax(scale q k^T + mask) v on AMX: as effc_flash.h goes over queries and keys, with both
// products of bf16 tiles. Scores, weights and sums are float32 between them; a weight is rounded to
// bf16 (parts) where it meets a value.
#include "effc_amx.h"
#include "effc_attention.h"
#include "effc_rows.h"

namespace effc {
namespace {

using amx::DEEP;
using amx::ROWS;

constexpr int64_t QUERIES = 192, KEYS = 192;  // of a block: its scores stay in the second-level cache
constexpr int64_t TOGETHER = 4;               // blocks of queries for which keys are packed once

// 16 rows of 16 pairs of bf16 become 16 pairs of rows: a tile of B. A pair moves as one float would.
static void turn_pairs(const uint16_t* from, int64_t ld, uint16_t* to) {
  for (int64_t i = 0; i < ROWS; i += WIDTH) {
    for (int64_t j = 0; j < ROWS; j += WIDTH) {
      vec v[WIDTH];
#pragma GCC unroll 16
      for (int r = 0; r < WIDTH; ++r) v[r] = load_vec(reinterpret_cast<const float*>(from + (i + r) * ld) + j);
      transpose<1>(v);
#pragma GCC unroll 16
      for (int r = 0; r < WIDTH; ++r) store_vec(reinterpret_cast<float*>(to + (j + r) * DEEP) + i, v[r]);
    }
  }
}

// Rows [0, count) of k become the columns of B. rows: room for 16 of them in bf16.
template <int PARTS, class T>
static void pack_keys(const T* k, int64_t ldk, int64_t count, int64_t depth, uint16_t* rows, uint16_t* b) {
  const int64_t deep = up(depth, DEEP), steps = deep / DEEP, part = ROWS * deep;
  const int64_t tiles = up(count, amx::COLUMNS) / amx::COLUMNS;
  for (int64_t c = 0; c < tiles; ++c) {
    for (int64_t i = 0; i < least(ROWS, count - c * ROWS); ++i) {
      amx::split_row<PARTS>(k + (c * ROWS + i) * ldk, depth, rows + i * deep, part);
    }
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t q = 0; q < PARTS; ++q) {
        turn_pairs(rows + q * part + s * DEEP, deep,
                   b + amx::place_in_panels(c, tiles, s, steps, q, PARTS));
      }
    }
  }
}

// Rows [0, count) of v are the rows of B, two of them beside each other.
template <int PARTS, class T>
static void pack_values(const T* v, int64_t ldv, int64_t count, int64_t results, uint16_t* rows, uint16_t* b) {
  const int64_t wide = up(results, DEEP), part = 2 * wide;
  const int64_t steps = up(count, DEEP) / DEEP, tiles = up(results, amx::COLUMNS) / amx::COLUMNS;
  for (int64_t pair = 0; pair < steps * ROWS; ++pair) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t row = 2 * pair + i;
      uint16_t* to = rows + i * wide;
      if (row < count) {
        amx::split_row<PARTS>(v + row * ldv, results, to, part);
        continue;
      }
      for (int64_t q = 0; q < PARTS; ++q) memset(to + q * part, 0, wide * sizeof(*to));
    }
    for (int64_t q = 0; q < PARTS; ++q) {
      for (int64_t c = 0; c < tiles; ++c) {
        const uint16_t* even = rows + q * part + c * amx::COLUMNS;
        uint16_t* to = b + amx::place_in_panels(c, tiles, pair / ROWS, steps, q, PARTS) + pair % ROWS * DEEP;
#pragma omp simd
        for (int64_t j = 0; j < amx::COLUMNS; ++j) to[2 * j] = even[j], to[2 * j + 1] = even[wide + j];
      }
    }
  }
}

template <int PARTS, class T>
static void run(char* const* p, const int64_t* n, int64_t threads) {
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], heads = n[2], queries = n[3], keys = n[4], depth = n[5], results = n[6];
  const int64_t sharing = n[7];
  const float scale = static_cast<float>(bit_cast<double>(n[8]));
  const bool causal = n[9] != 0;
  const int64_t *sq = n + 11, *sk = n + 14, *sv = n + 17, *sm = n + 20;
  if (batch == 0 || heads == 0 || queries == 0 || results == 0) return;
  // As many queries together as leave work for all threads.
  const int64_t fair = (batch * heads * queries + threads - 1) / threads;
  const int64_t group = up(least(least(QUERIES * TOGETHER, fair), queries), 2 * ROWS);
  const int64_t groups = (queries + group - 1) / group, block = least(QUERIES, group);
  // Without a mask scores are scaled where they become weights, which keeps their order.
  const bool plain = n[10] == NONE && scale > 0;
  const int64_t work = group * (keys + 1) * (depth + results) / 4;
  const int64_t deep = up(depth, DEEP), ldo = up(results, amx::COLUMNS), wide = up(results, DEEP);
  parallel_for(batch * heads * groups, grain_of(work), threads, [=](int64_t begin, int64_t end) {
    float* s = scratch<float>(block * KEYS);
    float* o = scratch<float>(group * ldo);
    uint16_t* qs = scratch<uint16_t>(PARTS * group * deep);
    uint16_t* weights = scratch<uint16_t>(PARTS * block * KEYS);
    uint16_t* kt = scratch<uint16_t>(PARTS * deep * KEYS);
    uint16_t* vp = scratch<uint16_t>(PARTS * KEYS * ldo);
    uint16_t* rows = scratch<uint16_t>(PARTS * (ROWS * deep + 2 * wide));
    float* top = scratch<float>(group);
    float* sum = scratch<float>(group);
    const uint16_t** from = scratch<const uint16_t*>(group / ROWS);
    const uint16_t** scores = scratch<const uint16_t*>(block / ROWS);
    int64_t* steps = scratch<int64_t>((deep + KEYS) / DEEP);
    for (int64_t i = 0; i < group / ROWS; ++i) from[i] = qs + i * ROWS * deep;
    for (int64_t i = 0; i < block / ROWS; ++i) scores[i] = weights + i * ROWS * KEYS;
    for (int64_t i = 0; i < (deep + KEYS) / DEEP; ++i) steps[i] = i * DEEP;
    amx::begin();
    for (int64_t at = begin; at < end; ++at) {
      const int64_t head = at / groups, start = group_of(at % groups, groups, causal) * group;
      const int64_t count = least(group, queries - start);
      const int64_t b = head / heads, h = head % heads, g = h / sharing;
      const T* q = reinterpret_cast<const T*>(p[1]) + b * sq[0] + h * sq[1] + start * sq[2];
      const T* k = reinterpret_cast<const T*>(p[2]) + b * sk[0] + g * sk[1];
      const T* v = reinterpret_cast<const T*>(p[3]) + b * sv[0] + g * sv[1];
      const Mask mask = {p[4] + (b * sm[0] + h * sm[1]) * size_of(n[10]), n[10], sm[2], sm[3]};
      const int64_t seen = causal ? least(keys, start + count) : keys;
      for (int64_t i = 0; i < count; ++i) {
        amx::split_row<PARTS>(q + i * sq[2], depth, qs + i * deep, group * deep);
      }
      for (int64_t key = 0; key < seen; key += KEYS) {
        const int64_t columns = least(KEYS, seen - key);
        pack_keys<PARTS>(k + key * sk[2], sk[2], columns, depth, rows, kt);
        pack_values<PARTS>(v + key * sv[2], sv[2], columns, results, rows, vp);
        for (int64_t i = 0; i < count; i += block) {
          const int64_t some = least(block, count - i), tiles = up(some, ROWS) / ROWS;
          if (causal && key > 0 && start + i + some <= key) continue;  // all of it lies ahead
          const Place place = {start + i, key, some, columns, causal};
          amx::tiles_product<PARTS>(from + i / ROWS, tiles, deep * sizeof(uint16_t), group * deep, steps,
                                    deep / DEEP, kt, columns, s, KEYS);
          const bool all = plain && !(causal && key + columns > start + i + 1);
          if (!all) mask_scores(s, KEYS, place, plain ? 1.0f : scale, mask);
          weigh(s, KEYS, some, columns, plain ? scale : 1.0f, key == 0, top + i, sum + i, o + i * ldo, ldo);
          for (int64_t r = 0; r < some; ++r) {
            amx::split_row<PARTS>(s + r * KEYS, columns, weights + r * KEYS, block * KEYS);
          }
          amx::tiles_product<PARTS>(scores, tiles, KEYS * sizeof(uint16_t), block * KEYS, steps,
                                    up(columns, DEEP) / DEEP, vp, results, o + i * ldo, ldo, key > 0);
        }
      }
      share_out(o, ldo, count, sum, seen > 0);
      epilogue(p, n + 25, o, ldo, head * queries + start, count, 0, results);
    }
    amx::end();
    release(s), release(o), release(qs), release(weights), release(kt), release(vp), release(rows);
    release(top), release(sum), release(from), release(scores), release(steps);
  });
}

}  // namespace
}  // namespace effc

// p and n: those of effc_attention, and before the epilogue's numbers parts of an operand (0: q, k and
// v are bf16 themselves).
EFFC_EXPORT void effc_attention_bf16(char* const* p, const int64_t* n, int64_t threads) {
  const auto run = n[24] == 0 ? effc::run<1, effc::bf16> : n[24] == 1 ? effc::run<1, float> : effc::run<2, float>;
  run(p, n, threads);
}
