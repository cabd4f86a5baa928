// softmax(scale q k^T + mask) v without ever holding all scores: sums so far are rescaled when a larger
// score is met (FlashAttention, online softmax). q, k and v are of one type, float or a 16-bit one, or k
// and v are codes with a scale for each row; scores and sums are float32.
//
// Many queries: a block of them goes over blocks of keys, which are turned into panels.
// Few queries, as in a step of decoding: keys and values are read once, as they lie, for all heads that
// share them; threads split the keys of all heads evenly, and join what they have of one head.
#pragma once

#include "effc_attention.h"
#include "effc_rows.h"

namespace effc {
namespace {

constexpr int64_t QUERIES = 192, KEYS = 192;  // of a block: its scores stay in the second-level cache
constexpr int64_t TOGETHER = 4;               // blocks of queries for which keys are packed once
constexpr int64_t FEW = 16;                   // so few queries do not pay for turning keys into panels
constexpr int64_t SPLIT = 32;                 // keys that threads do not split further
constexpr int64_t WORTH = 128 << 10;          // bytes to read that are worth a thread: about 10 us

// What rows of codes are multiplied by: floats of a kind (0: 32 bits, 1: half, 2: bf16), `step` apart.
struct Scales {
  const char* data;
  int64_t kind, step;

  Scales(const char* from, const int64_t* n, int64_t b, int64_t g, int64_t row)
      : data(from + (b * n[1] + g * n[2] + row * n[3]) * (n[0] == 0 ? 4 : 2)), kind(n[0]), step(n[3]) {}

  float at(int64_t i) const {
    if (kind == 0) return reinterpret_cast<const float*>(data)[i * step];
    if (kind == 1) return load(reinterpret_cast<const half*>(data) + i * step);
    return load(reinterpret_cast<const bf16*>(data) + i * step);
  }
};

// s[i][j] *= scale j: a product with rows of codes becomes one with the rows.
static void scale_columns(float* s, int64_t ld, int64_t rows, const Scales& scales, int64_t columns) {
  float by[KEYS];
  for (int64_t j = 0; j < columns; ++j) by[j] = scales.at(j);
  for (int64_t i = 0; i < rows; ++i, s += ld) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) s[j] *= by[j];
  }
}

// p: y, q, k, v, mask (anything where there is none), then with a past where that number is and the
// error word, then what the epilogue reads. n: the epilogue's address, batch, heads, queries, keys, depth,
// results, heads that share keys, scale (a double), causal, kind of mask, steps between batches, heads and
// rows of q, of k and of v, and between batches, heads, rows and columns of the mask, whether there is a
// past; then the epilogue's.
//
// With a past, k and v may lie in pages: then p has the table after the error word (anything where they do
// not), and n the rows of a page (0: no pages), the step between sequences in the table, and how many pages
// there are; batches of k and v are pages, then, which the table names for each sequence.
//
// Of codes: p has the scales of k and of v after the table; n has, before what is the epilogue's, for k and
// for v the kind of scales and their steps between batches, heads and rows.
template <class T, class K = T>
struct Attention {
  static constexpr bool coded = !std::is_same_v<T, K>;
  static constexpr int64_t own = coded ? 36 : 28;  // numbers that are not the epilogue's
  char* const* p;
  const int64_t* n;
  Epilogue epilogue;
  int64_t batch, heads, queries, keys, depth, results, sharing;
  float scale;
  bool causal, plain;  // plain: scaled where scores become weights, which keeps their order
  const int64_t *sq, *sk, *sv, *sm;
  int64_t past = 0;  // keys before that of the first query
  int64_t page = 0, tables = 0;
  const int64_t* table = nullptr;

  Attention(char* const* p, const int64_t* n)
      : p(p), n(n), epilogue(reinterpret_cast<Epilogue>(n[0])), batch(n[1]), heads(n[2]), queries(n[3]),
        keys(n[4]), depth(n[5]), results(n[6]), sharing(n[7]), scale(static_cast<float>(bit_cast<double>(n[8]))),
        causal(n[9] != 0), plain(n[10] == NONE && scale > 0), sq(n + 11), sk(n + 14), sv(n + 17), sm(n + 20) {}

  // With a past: reads it; false where positions do not fit the cache, which the error word then says.
  bool with_past() {
    if (n[24] == 0) return true;
    past = *reinterpret_cast<const int64_t*>(p[5]);
    if (past < 0 || past > keys - queries) return *reinterpret_cast<int64_t*>(p[6]) = 1, false;
    keys = past + queries;
    return in_pages();
  }

  // false where the table names a page that is not there.
  bool in_pages() {
    if ((page = n[25]) == 0) return true;
    table = reinterpret_cast<const int64_t*>(p[7]), tables = n[26];
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i * page < keys; ++i) {
        const int64_t at = table[b * tables + i];
        if (at < 0 || at >= n[27]) return *reinterpret_cast<int64_t*>(p[6]) = 1, false;
      }
    }
    return true;
  }

  const T* q(int64_t b, int64_t h) const { return reinterpret_cast<const T*>(p[1]) + b * sq[0] + h * sq[1]; }
  // From a key on, `count` at most, those that lie in a row: how many.
  int64_t in_row(int64_t key, int64_t count) const { return page == 0 ? count : least(count, page - key % page); }
  // Where a key lies: which batch or page, and which row of it.
  int64_t home(int64_t b, int64_t key) const { return page == 0 ? b : table[b * tables + key / page]; }
  int64_t row(int64_t key) const { return page == 0 ? key : key % page; }

  const K* k(int64_t b, int64_t g, int64_t key) const {
    return reinterpret_cast<const K*>(p[2]) + home(b, key) * sk[0] + g * sk[1] + row(key) * sk[2];
  }
  const K* v(int64_t b, int64_t g, int64_t key) const {
    return reinterpret_cast<const K*>(p[3]) + home(b, key) * sv[0] + g * sv[1] + row(key) * sv[2];
  }
  Scales k_scales(int64_t b, int64_t g, int64_t key) const { return {p[8], n + 28, home(b, key), g, row(key)}; }
  Scales v_scales(int64_t b, int64_t g, int64_t key) const { return {p[9], n + 32, home(b, key), g, row(key)}; }
  Mask mask(int64_t b, int64_t h) const {
    return {p[4] + (b * sm[0] + h * sm[1]) * size_of(n[10]), n[10], sm[2], sm[3]};
  }
  void finish(const float* o, int64_t ldo, int64_t row, int64_t rows) const {
    epilogue(p, n + own, o, ldo, row, rows, 0, results);
  }
};

template <class T, class K>
static void attention_of_many(const Attention<T, K>& a, int64_t threads) {
  constexpr bool direct = std::is_same_v<T, float>;
  const int64_t queries = a.queries, keys = a.keys, depth = a.depth, results = a.results;
  // As many queries together as leave work for all threads.
  const int64_t fair = (a.batch * a.heads * queries + threads - 1) / threads;
  const int64_t group = up(least(least(QUERIES * TOGETHER, fair), queries), TILE_ROWS);
  const int64_t groups = (queries + group - 1) / group, block = least(QUERIES, group);
  const int64_t work = group * (keys + 1) * (depth + results);
  parallel_for(a.batch * a.heads * groups, grain_of(work), threads, [=](int64_t begin, int64_t end) {
    const int64_t lds = up(KEYS, WIDTH), ldo = up(results, WIDTH);
    float* s = scratch<float>(block * lds);
    float* o = scratch<float>(group * ldo);
    float* kt = scratch<float>(depth * lds);
    float* vp = scratch<float>(KEYS * ldo);
    float* floats = scratch<float>(direct ? 0 : group * depth);
    float* top = scratch<float>(group);
    float* sum = scratch<float>(group);
    const float** from = scratch<const float*>(group);
    const float** scores = scratch<const float*>(block);
    for (int64_t i = 0; i < block; ++i) scores[i] = s + i * lds;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t head = at / groups, start = group_of(at % groups, groups, a.causal) * group;
      const int64_t count = least(group, queries - start);
      const int64_t b = head / a.heads, h = head % a.heads, g = h / a.sharing;
      const T* q = a.q(b, h) + start * a.sq[2];
      const Mask mask = a.mask(b, h);
      const int64_t seen = a.causal ? least(keys, a.past + start + count) : keys;
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (direct) from[i] = q + i * a.sq[2];
        if constexpr (!direct) {
          to_floats(q + i * a.sq[2], floats + i * depth, depth);
          from[i] = floats + i * depth;
        }
      }
      for (int64_t key = 0, columns; key < seen; key += columns) {
        columns = a.in_row(key, least(KEYS, seen - key));
        pack(a.k(b, g, key), a.sk[2], columns, depth, kt);
        pack_columns(a.v(b, g, key), a.sv[2], columns, results, vp);
        for (int64_t i = 0; i < count; i += block) {
          const int64_t rows = least(block, count - i), own = a.past + start + i;  // place of the first
          if (a.causal && key > 0 && own + rows <= key) continue;  // all of it lies ahead
          panels_product(from + i, rows, 1, depth, kt, columns, s, lds);
          if constexpr (Attention<T, K>::coded) scale_columns(s, lds, rows, a.k_scales(b, g, key), columns);
          if (!a.plain || (a.causal && key + columns > own + 1)) {
            const Place place = {start + i, key, rows, columns, a.causal, a.past};
            mask_scores(s, lds, place, a.plain ? 1.0f : a.scale, mask);
          }
          weigh(s, lds, rows, columns, a.plain ? a.scale : 1.0f, key == 0, top + i, sum + i, o + i * ldo, ldo);
          if constexpr (Attention<T, K>::coded) scale_columns(s, lds, rows, a.v_scales(b, g, key), columns);
          panels_product(scores, rows, 1, columns, vp, results, o + i * ldo, ldo, key > 0);
        }
      }
      share_out(o, ldo, count, sum, seen > 0);
      a.finish(o, ldo, head * queries + start, count);
    }
    release(s), release(o), release(kt), release(vp), release(floats), release(top), release(sum);
    release(from), release(scores);
  });
}

// What a thread has of the queries that share a head's keys: results so far and what they are scaled by.
// A head whose keys several threads saw is `part` of each.
struct Share {
  int64_t head = -1;
  float *o, *top, *sum;
};

template <class T, class K>
class FewQueries {
 public:
  explicit FewQueries(const Attention<T, K>& a)
      : a(a), rows(a.sharing * a.queries), ldq(up(a.depth, STEP)), ldo(up(a.results, STEP)) {}

  // The pieces [begin, end) of all heads' keys. first, last: where parts of heads go that others see too.
  void run(int64_t begin, int64_t end, Share& first, Share& last) const {
    float* q = scratch<float>(rows * ldq);
    float* s = scratch<float>(rows * KEYS);
    Share own = {-1, scratch<float>(rows * ldo), scratch<float>(rows), scratch<float>(rows)};
    for (int64_t at = begin; at < end;) {
      const int64_t head = at / pieces(), stop = least((head + 1) * pieces(), end);
      const bool all = at == head * pieces() && stop == at + pieces();
      Share& to = all ? own : first.head < 0 && at == begin ? first : last;
      to.head = head;
      over_keys(to, at % pieces() * SPLIT, least((stop - head * pieces()) * SPLIT, a.keys), q, s);
      if (all) finish(to);
      at = stop;
    }
    release(q), release(s), release(own.o), release(own.top), release(own.sum);
  }

  // Parts of a head, with their results in the first of them.
  void join(Share* parts, int64_t count) const {
    Share& to = parts[0];
    for (int64_t r = 0; r < rows; ++r) {
      float top = to.top[r];
      for (int64_t c = 1; c < count; ++c) top = parts[c].top[r] > top ? parts[c].top[r] : top;
      float total = 0;
      for (int64_t c = 0; c < count; ++c) {
        const float by = a.plain ? a.scale * detail::kLog2e : detail::kLog2e;
        const float weight = parts[c].top[r] == -detail::kInf ? 0.0f : weight_of(by * (parts[c].top[r] - top));
        const float* from = parts[c].o + r * ldo;
        float* o = to.o + r * ldo;
        total += parts[c].sum[r] * weight;
        for (int64_t j = 0; j < ldo; ++j) o[j] = (c ? o[j] : 0.0f) + weight * from[j];
      }
      to.sum[r] = total;
    }
    finish(to);
  }

  int64_t pieces() const { return (a.keys + SPLIT - 1) / SPLIT; }  // of a head
  int64_t groups() const { return a.batch * (a.heads / a.sharing); }
  int64_t piece_bytes() const { return SPLIT * (a.depth + a.results) * sizeof(K) * (1 + rows / 8); }

  Share share() const { return {-1, scratch<float>(rows * ldo), scratch<float>(rows), scratch<float>(rows)}; }

  void finish(const Share& of) const {
    share_out(of.o, ldo, rows, of.sum, true);
    for (int64_t r = 0; r < rows; ++r) from_lanes<K>(of.o + r * ldo, a.results);
    a.finish(of.o, ldo, of.head * rows, rows);
  }

  void nothing_seen() const {
    float* o = scratch<float>(rows * ldo);
    memset(o, 0, rows * ldo * sizeof(float));
    for (int64_t head = 0; head < groups(); ++head) a.finish(o, ldo, head * rows, rows);
    release(o);
  }

 private:
  const Attention<T, K>& a;
  int64_t rows, ldq, ldo;  // rows: queries of all heads that share keys

  void over_keys(Share& to, int64_t begin, int64_t end, float* q, float* s) const {
    const int64_t shared = a.heads / a.sharing, b = to.head / shared, g = to.head % shared;
    for (int64_t r = 0; r < rows; ++r) {
      to_lanes_of<K>(a.q(b, g * a.sharing + r / a.queries) + r % a.queries * a.sq[2], q + r * ldq, a.depth);
    }
    memset(to.o, 0, rows * ldo * sizeof(float));
    for (int64_t key = begin, columns; key < end; key += columns) {
      columns = a.in_row(key, least(KEYS, end - key));
      few_rows(q, ldq, rows, a.k(b, g, key), a.sk[2], columns, a.depth, s, KEYS);
      if constexpr (Attention<T, K>::coded) scale_columns(s, KEYS, rows, a.k_scales(b, g, key), columns);
      if (!a.plain || (a.causal && key + columns > a.past + 1)) {
        const Place place = {0, key, a.queries, columns, a.causal, a.past};
        for (int64_t h = 0; h < a.sharing; ++h) {
          mask_scores(s + h * a.queries * KEYS, KEYS, place, a.plain ? 1.0f : a.scale, a.mask(b, g * a.sharing + h));
        }
      }
      weigh(s, KEYS, rows, columns, a.plain ? a.scale : 1.0f, key == begin, to.top, to.sum, to.o, ldo);
      if constexpr (Attention<T, K>::coded) scale_columns(s, KEYS, rows, a.v_scales(b, g, key), columns);
      few_rows_short(s, KEYS, rows, a.v(b, g, key), a.sv[2], columns, a.results, to.o, ldo);
    }
  }
};

template <class T, class K>
static void attention_of_few(const Attention<T, K>& a, int64_t threads) {
  const FewQueries<T, K> few(a);
  if (a.keys == 0) return few.nothing_seen();
  const int64_t pieces = few.groups() * few.pieces(), grain = 1 + WORTH / (few.piece_bytes() + 1);
  const int64_t parts = least(threads, pieces);
  Share* shares = scratch<Share>(2 * parts);
  for (int64_t i = 0; i < 2 * parts; ++i) shares[i] = few.share();
  parallel_for(pieces, grain, threads, [&](int64_t begin, int64_t end, int64_t part) {
    few.run(begin, end, shares[2 * part], shares[2 * part + 1]);
  });
  // A head's parts follow each other, as threads took pieces in order.
  int64_t known = 0;
  Share* parts_of = scratch<Share>(2 * parts);
  for (int64_t i = 0; i <= 2 * parts; ++i) {
    const bool more = i < 2 * parts;
    if (more && shares[i].head < 0) continue;
    if (known > 0 && (!more || parts_of[0].head != shares[i].head)) few.join(parts_of, known), known = 0;
    if (more) parts_of[known++] = shares[i];
  }
  for (int64_t i = 0; i < 2 * parts; ++i) release(shares[i].o), release(shares[i].top), release(shares[i].sum);
  release(shares), release(parts_of);
}

template <class T, class K = T>
static void attention(char* const* p, const int64_t* n, int64_t threads) {
  Attention<T, K> a(p, n);
  if (!a.with_past() || a.batch == 0 || a.heads == 0 || a.queries == 0 || a.results == 0) return;
  if (a.queries * a.sharing <= FEW) return attention_of_few(a, threads);
  attention_of_many(a, threads);
}

}  // namespace
}  // namespace effc
