// softmax(scale q k^T + mask) v without ever holding all scores: a block of queries goes over blocks
// of keys, and sums so far are rescaled when a larger score is met (FlashAttention, online softmax).
#include "effc_rows.h"

namespace effc {
namespace {

constexpr int64_t QUERIES = 192, KEYS = 192;  // of a block: its scores stay in the second-level cache
constexpr int64_t TOGETHER = 4;               // blocks of queries for which keys are packed once
constexpr int64_t FEW_QUERIES = 4;            // so few do not pay for turning keys into panels

enum MaskKind { NONE, ADDED, KEPT };

struct Mask {
  const char* data;
  int64_t kind, row, column;  // steps in elements
};

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

// Where the scores of a block stand: query i is at place + i, key j at key + j.
struct Place {
  int64_t query, key, queries, keys;
  bool causal;  // a query sees keys up to its own place
};

// Scores times scale and masked.
static void mask_scores(float* s, int64_t ld, const Place& at, float scale, const Mask& mask) {
  for (int64_t i = 0; i < at.queries; ++i, s += ld) {
    const int64_t seen = at.causal ? least(at.keys, at.query + i + 1 - at.key) : at.keys;
    const int64_t past = seen > 0 ? seen : 0;
    const int64_t from = (at.query + i) * mask.row + at.key * mask.column;
    if (mask.kind == ADDED) {
      const float* m = reinterpret_cast<const float*>(mask.data) + from;
      if (mask.column == 1) {
#pragma omp simd
        for (int64_t j = 0; j < past; ++j) s[j] = s[j] * scale + m[j];
      } else {
        for (int64_t j = 0; j < past; ++j) s[j] = s[j] * scale + m[j * mask.column];
      }
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
// shrink to it.
static void weigh(float* s, int64_t ld, const Place& at, float scale, float* top, float* sum, float* o,
                  int64_t ldo) {
  const bool first = at.key == 0;
  scale *= detail::kLog2e;
  for (int64_t i = 0; i < at.queries; ++i, s += ld, o += ldo) {
    float now = first ? -detail::kInf : top[i];
#pragma omp simd reduction(max : now)
    for (int64_t j = 0; j < at.keys; ++j) now = now > s[j] ? now : s[j];
    const float base = now == -detail::kInf ? 0.0f : now;  // nothing seen yet: all weights are 0
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < at.keys; ++j) {
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

// Rows [0, k) of v, `n` numbers each, into panels.
static void pack_values(const float* v, int64_t ldv, int64_t k, int64_t n, float* b) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t columns = least(n - j, PANEL), step = up(columns, WIDTH);
    for (int64_t i = 0; i < k; ++i, b += step) {
      const float* from = v + i * ldv + j;
      if (columns == PANEL) {
#pragma GCC unroll 4
        for (int q = 0; q < TILE_VECTORS; ++q) store_vec(b + q * WIDTH, load_vec(from + q * WIDTH));
        continue;
      }
      for (int64_t q = 0; q < step; ++q) b[q] = q < columns ? from[q] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace effc

// p: y, q, k, v, mask (anything where there is none), then what the epilogue reads. n: the epilogue's
// address, batch, heads, queries, keys, depth, results, heads that share keys, scale (a double), causal,
// kind of mask, steps between batches, heads and rows of q, of k and of v, and between batches, heads,
// rows and columns of the mask; then the epilogue's.
EFFC_EXPORT void effc_attention(char* const* p, const int64_t* n, int64_t threads) {
  using namespace effc;
  const auto epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t batch = n[1], heads = n[2], queries = n[3], keys = n[4], depth = n[5], results = n[6];
  const int64_t sharing = n[7];
  const float scale = static_cast<float>(bit_cast<double>(n[8]));
  const bool causal = n[9] != 0;
  const int64_t *sq = n + 11, *sk = n + 14, *sv = n + 17, *sm = n + 20;
  if (batch == 0 || heads == 0 || queries == 0 || results == 0) return;
  // As many queries together as leave work for all threads.
  const int64_t fair = (batch * heads * queries + threads - 1) / threads;
  const int64_t group = up(least(least(QUERIES * TOGETHER, fair), queries), TILE_ROWS);
  const int64_t groups = (queries + group - 1) / group, block = least(QUERIES, group);
  const int64_t size = n[10] == KEPT ? 1 : static_cast<int64_t>(sizeof(float));
  // Without a mask scores are scaled where they become weights, which keeps their order.
  const bool plain = n[10] == NONE && scale > 0;
  const int64_t work = group * (keys + 1) * (depth + results);
  parallel_for(batch * heads * groups, grain_of(work), threads, [=](int64_t begin, int64_t end) {
    const int64_t lds = up(KEYS, WIDTH), ldo = up(results, WIDTH);
    float* s = scratch<float>(block * lds);
    float* o = scratch<float>(group * ldo);
    float* kt = scratch<float>(depth * lds);
    float* vp = scratch<float>(KEYS * ldo);
    float* top = scratch<float>(group);
    float* sum = scratch<float>(group);
    const float** from = scratch<const float*>(group);
    const float** scores = scratch<const float*>(block);
    for (int64_t i = 0; i < block; ++i) scores[i] = s + i * lds;
    for (int64_t at = begin; at < end; ++at) {
      // Later queries of a causal product see more keys: first and last groups take turns, so that
      // threads get equal shares.
      const int64_t head = at / groups, turn = at % groups;
      const int64_t which = !causal ? turn : turn % 2 ? groups - 1 - turn / 2 : turn / 2;
      const int64_t start = which * group, count = least(group, queries - start);
      const int64_t b = head / heads, h = head % heads, g = h / sharing;
      const float* q = reinterpret_cast<const float*>(p[1]) + b * sq[0] + h * sq[1] + start * sq[2];
      const float* k = reinterpret_cast<const float*>(p[2]) + b * sk[0] + g * sk[1];
      const float* v = reinterpret_cast<const float*>(p[3]) + b * sv[0] + g * sv[1];
      const Mask mask = {p[4] + (b * sm[0] + h * sm[1]) * size, n[10], sm[2], sm[3]};
      const int64_t seen = causal ? least(keys, start + count) : keys;
      const bool few = count <= FEW_QUERIES, as_it_lies = few && results % WIDTH == 0;
      for (int64_t i = 0; i < count; ++i) from[i] = q + i * sq[2];
      for (int64_t key = 0; key < seen; key += KEYS) {
        const int64_t columns = least(KEYS, seen - key);
        if (!few) pack(k + key * sk[2], sk[2], columns, depth, kt);
        if (!as_it_lies) pack_values(v + key * sv[2], sv[2], columns, results, vp);
        for (int64_t i = 0; i < count; i += block) {
          const int64_t rows = least(block, count - i);
          if (causal && key > 0 && start + i + rows <= key) continue;  // all of it lies ahead
          const Place place = {start + i, key, rows, columns, causal};
          if (few) {
            few_rows(q, sq[2], count, k + key * sk[2], sk[2], columns, depth, s, lds);
          } else {
            panels_product(from + i, rows, 1, depth, kt, columns, s, lds);
          }
          const bool all = plain && !(causal && key + columns > start + i + 1);
          if (!all) mask_scores(s, lds, place, plain ? 1.0f : scale, mask);
          weigh(s, lds, place, plain ? scale : 1.0f, top + i, sum + i, o + i * ldo, ldo);
          if (as_it_lies) {
            rows_product(scores, rows, columns, v + key * sv[2], sv[2], results, o, ldo, key > 0);
          } else {
            panels_product(scores, rows, 1, columns, vp, results, o + i * ldo, ldo, key > 0);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const float share = seen == 0 || sum[i] == 0 ? 0.0f : 1.0f / sum[i];  // sees nothing: 0
        float* line = o + i * ldo;
        if (seen == 0) memset(line, 0, ldo * sizeof(float));
#pragma omp simd
        for (int64_t j = 0; j < ldo; ++j) line[j] *= share;
      }
      epilogue(p, n + 24, o, ldo, head * queries + start, count, 0, results);
    }
    release(s), release(o), release(kt), release(vp), release(top), release(sum), release(from), release(scores);
  });
}
