// Attention between its two products, in float32: masks, and the online softmax over blocks of keys.
// Only the sources in core/ include this.
#pragma once

#include "effc_tile.h"

namespace effc {
namespace {

enum MaskKind { NONE, ADDED, KEPT, ADDED_BF16, ADDED_F16 };

EFFC_INLINE int64_t size_of(int64_t kind) { return kind == KEPT ? 1 : kind == NONE || kind == ADDED ? 4 : 2; }

struct Mask {
  const char* data;
  int64_t kind, row, column;  // steps in elements
};

// The group of queries that comes at a turn. Later queries of a causal product see more keys: first and
// last groups alternate, so that threads get equal shares.
EFFC_INLINE int64_t group_of(int64_t turn, int64_t groups, bool causal) {
  if (!causal) return turn;
  return turn % 2 ? groups - 1 - turn / 2 : turn / 2;
}

// 2^x for x <= 0, and 0 where that is no normal number. The polynomial is a minimax fit, 2^-27.
EFFC_INLINE float weight_of(float x) {
  const float t = x + detail::kRound, r = x - (t - detail::kRound);
  float q = 1.5353362e-4f;
  q = q * r + 1.3398874e-3f;
  q = q * r + 9.6184373e-3f;
  q = q * r + 5.5503324e-2f;
  q = q * r + 2.4022648e-1f;
  q = q * r + 6.9314718e-1f;
  q = q * r + 1.0f;
  return x < -126.0f ? 0.0f : q * bit_cast<float>((bit_cast<uint32_t>(t) + 127u) << 23);
}

// Where the scores of a block stand: they are of queries from `query` and of keys from `key` on.
struct Place {
  int64_t query, key, queries, keys;
  bool causal;       // query i sees keys up to past + i
  int64_t past = 0;  // keys before that of the first query
};

// s[j] = s[j] scale + m[j]
template <class T>
EFFC_INLINE void add_mask(float* s, int64_t count, float scale, const T* m, int64_t step) {
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] = s[j] * scale + load(m + j);
  } else {
    for (int64_t j = 0; j < count; ++j) s[j] = s[j] * scale + load(m + j * step);
  }
}

// Scores times scale and masked.
static void mask_scores(float* s, int64_t ld, const Place& at, float scale, const Mask& mask) {
  for (int64_t i = 0; i < at.queries; ++i, s += ld) {
    const int64_t seen = at.causal ? least(at.keys, at.past + at.query + i + 1 - at.key) : at.keys;
    const int64_t past = seen > 0 ? seen : 0;
    const int64_t from = (at.query + i) * mask.row + at.key * mask.column;
    if (mask.kind == ADDED) {
      add_mask(s, past, scale, reinterpret_cast<const float*>(mask.data) + from, mask.column);
    } else if (mask.kind == ADDED_BF16) {
      add_mask(s, past, scale, reinterpret_cast<const bf16*>(mask.data) + from, mask.column);
    } else if (mask.kind == ADDED_F16) {
      add_mask(s, past, scale, reinterpret_cast<const half*>(mask.data) + from, mask.column);
    } else if (mask.kind == KEPT) {
      const char* m = mask.data + from;
      // Added, as torch does: a NaN stays one.
      for (int64_t j = 0; j < past; ++j) s[j] = s[j] * scale + (m[j * mask.column] ? 0.0f : -detail::kInf);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < past; ++j) s[j] *= scale;
    }
    for (int64_t j = past; j < at.keys; ++j) s[j] = -detail::kInf;
  }
}

// Scores become weights e^(scale (s - top)), with the top of all scores so far; sums and results so far
// shrink to it. first: there are none so far.
static void weigh(float* s, int64_t ld, int64_t queries, int64_t keys, float scale, bool first, float* top,
                  float* sum, float* o, int64_t ldo) {
  scale *= detail::kLog2e;
  for (int64_t i = 0; i < queries; ++i, s += ld, o += ldo) {
    float now = first ? -detail::kInf : top[i];
#pragma omp simd reduction(max : now)
    for (int64_t j = 0; j < keys; ++j) now = now > s[j] ? now : s[j];
    const float base = now == -detail::kInf ? 0.0f : now;  // nothing seen yet: all weights are 0
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < keys; ++j) {
      const float e = weight_of(scale * (s[j] - base));
      s[j] = e;
      total += e;
    }
    if (first) {
      sum[i] = total;
    } else {
      const float shrink = weight_of(scale * (top[i] - base));
      sum[i] = sum[i] * shrink + total;
      if (shrink != 1.0f) {
#pragma omp simd
        for (int64_t j = 0; j < ldo; ++j) o[j] *= shrink;
      }
    }
    top[i] = now;
  }
}

// Results become averages: weights of a query sum to 1, and one that sees nothing gives 0.
static void share_out(float* o, int64_t ldo, int64_t count, const float* sum, bool any) {
  for (int64_t i = 0; i < count; ++i, o += ldo) {
    const float share = !any || sum[i] == 0 ? 0.0f : 1.0f / sum[i];
    if (!any) memset(o, 0, ldo * sizeof(float));
#pragma omp simd
    for (int64_t j = 0; j < ldo; ++j) o[j] *= share;
  }
}

}  // namespace
}  // namespace effc
