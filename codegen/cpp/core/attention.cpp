// softmax(scale q k^T + mask) v without ever holding all scores: a block of queries goes over blocks
// of keys, and sums so far are rescaled when a larger score is met (FlashAttention, online softmax).
#include "effc_attention.h"
#include "effc_rows.h"

namespace effc {
namespace {

constexpr int64_t QUERIES = 192, KEYS = 192;  // of a block: its scores stay in the second-level cache
constexpr int64_t TOGETHER = 4;               // blocks of queries for which keys are packed once
constexpr int64_t FEW_QUERIES = 4;            // so few do not pay for turning keys into panels

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
      const int64_t head = at / groups, start = group_of(at % groups, groups, causal) * group;
      const int64_t count = least(group, queries - start);
      const int64_t b = head / heads, h = head % heads, g = h / sharing;
      const float* q = reinterpret_cast<const float*>(p[1]) + b * sq[0] + h * sq[1] + start * sq[2];
      const float* k = reinterpret_cast<const float*>(p[2]) + b * sk[0] + g * sk[1];
      const float* v = reinterpret_cast<const float*>(p[3]) + b * sv[0] + g * sv[1];
      const Mask mask = {p[4] + (b * sm[0] + h * sm[1]) * size_of(n[10]), n[10], sm[2], sm[3]};
      const int64_t seen = causal ? least(keys, start + count) : keys;
      const bool few = count <= FEW_QUERIES, as_it_lies = few && results % WIDTH == 0;
      for (int64_t i = 0; i < count; ++i) from[i] = q + i * sq[2];
      for (int64_t key = 0; key < seen; key += KEYS) {
        const int64_t columns = least(KEYS, seen - key);
        if (!few) pack(k + key * sk[2], sk[2], columns, depth, kt);
        if (!as_it_lies) pack_columns(v + key * sv[2], sv[2], columns, results, vp);
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
      share_out(o, ldo, count, sum, seen > 0);
      epilogue(p, n + 24, o, ldo, head * queries + start, count, 0, results);
    }
    release(s), release(o), release(kt), release(vp), release(top), release(sum), release(from), release(scores);
  });
}
