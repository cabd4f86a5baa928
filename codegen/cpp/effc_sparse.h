// Products with a matrix of which only some groups of GROUP codes of a row are kept: scale * (code - zero),
// and zeros elsewhere. (GQSA, arXiv 2412.17560, section 3)
//
// All kept groups of the matrix are one list, in chunks of CHUNK codes that lie one after the other: codes,
// then the groups' scales, their zeros, and where in a row they begin, counted in UNITs. A chunk goes with no
// row: the list is cut into equal parts whatever the rows are, and a row that goes across a border is put
// together afterwards, in order.
//
// Eight groups, a block, make a vector of sums: vector j of a block holds the codes of groups in such an order
// that their sums come out in order (`group_at`). A place takes 16 bits: a bit for every group of a row, kept or
// not, would be 0.4 bits less for an element with half of the groups kept; it took 10 to 20 % longer (Zen 3).
//
// Before a translation unit includes this it says what it reads: EFFC_GROUP, EFFC_BITS; EFFC_ZERO: bits of a
// stored zero, 0 where all groups share one; EFFC_WIDE_CODES: code - zero may exceed 6 bits and a sign;
// EFFC_SCALE and EFFC_X: types of the scales and of x, int8_t where it is codes; EFFC_NAME: the core's.
#pragma once

#include "effc_rows.h"

namespace effc {
namespace {

typedef EFFC_X X;
typedef EFFC_SCALE Scale;
constexpr bool CODES = sizeof(X) == 1;  // x is codes: sums of a group are whole numbers
constexpr int GROUP = EFFC_GROUP, BITS = EFFC_BITS, ZERO = EFFC_ZERO;
constexpr bool WIDE_CODES = EFFC_WIDE_CODES;

constexpr int CHUNK = 256, VECTOR = 32, TOGETHER = 8;        // codes of a chunk, of a vector; groups of a block
constexpr int GROUPS = CHUNK / GROUP;                        // of a chunk
constexpr int BLOCKS = GROUPS / TOGETHER, VECTORS = GROUP / 4;  // blocks of a chunk, vectors of a block
constexpr int64_t CODE_BYTES = VECTOR * BITS, SCALE_BYTES = GROUPS * sizeof(Scale);
constexpr int64_t ZERO_BYTES = GROUPS * ZERO / 8;
constexpr int64_t CHUNK_BYTES = CODE_BYTES + SCALE_BYTES + ZERO_BYTES + GROUPS * 2;
constexpr int UNIT = 8;                                      // elements; places of groups are counted in them
constexpr int64_t SOME = 32;                                 // rows of x together
constexpr int64_t SUMS = 4096;                               // sums between two calls of the epilogue
constexpr int64_t AHEAD = 4096;                              // bytes that are on their way
constexpr int64_t WORTH = 128 << 10;                         // bytes to read that are worth a thread: about 10 us

static_assert(GROUP == 8 || GROUP == 16 || GROUP == 32, "groups fill a half of a vector, or it all, or a quarter");

// The group of a block that byte i of its vector j belongs to.
constexpr int group_at(int j, int i) {
  return GROUP == 32 ? j : GROUP == 16 ? j + i / 16 * 4 : i / 16 * 4 + 2 * j + i % 16 / 8;
}

// ---------------------------------------------------------------- what a chunk holds

#if defined(__AVX2__)

EFFC_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
EFFC_INLINE __m256i twice(__m128i v) { return _mm256_broadcastsi128_si256(v); }

// Bits [SHIFT, SHIFT + W) of the codes of vector j, from where W bits of every code lie: field f of vector i
// there belongs to vector f * W + i.
template <int W, int SHIFT>
EFFC_INLINE __m256i field(const uint8_t* part, int j) {
  const __m256i v = load256(part + VECTOR * (j % W));
  if constexpr (W == 8) return v;
  const int down = j / W * W - SHIFT;
  const __m256i moved = down > 0 ? _mm256_srli_epi16(v, down) : down < 0 ? _mm256_slli_epi16(v, -down) : v;
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(((1 << W) - 1) << SHIFT)));
}

// Vector j of a chunk's codes, as they are stored: not below zero.
EFFC_INLINE __m256i codes_of(const uint8_t* chunk, int j) {
  if constexpr (BITS == 8) return load256(chunk + VECTOR * j);
  constexpr int A = BITS & 4, B = BITS & 2;
  __m256i made = _mm256_setzero_si256();
  if constexpr (A) made = field<4, 0>(chunk, j);
  if constexpr (B) made = _mm256_or_si256(made, field<2, A>(chunk + VECTOR * A, j));
  if constexpr (BITS & 1) made = _mm256_or_si256(made, field<1, A + B>(chunk + VECTOR * (A + B), j));
  return made;
}

// The scales of block k.
EFFC_INLINE __m256 scales_of(const uint8_t* chunk, int k) {
  float scales[TOGETHER];
  const Scale* from = reinterpret_cast<const Scale*>(chunk + CODE_BYTES) + k * TOGETHER;
  if constexpr (std::is_same_v<Scale, half>) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (std::is_same_v<Scale, bf16>) load_row(from, scales, TOGETHER);
  if constexpr (std::is_same_v<Scale, float>) memcpy(scales, from, sizeof(scales));
  return _mm256_loadu_ps(scales);
}

struct Spread {
  alignas(32) uint8_t of[VECTORS][VECTOR];
  constexpr Spread() : of() {
    for (int j = 0; j < VECTORS; ++j) {
      for (int i = 0; i < VECTOR; ++i) of[j][i] = static_cast<uint8_t>(group_at(j, i));
    }
  }
};
constexpr Spread SPREAD;

// The zeros of the groups of each pair of blocks, a byte each, twice.
EFFC_INLINE void zeros_of(const uint8_t* chunk, int64_t shared, __m256i (&to)[(BLOCKS + 1) / 2]) {
  const uint8_t* from = chunk + CODE_BYTES + SCALE_BYTES;
#pragma GCC unroll 2
  for (int i = 0; i < (BLOCKS + 1) / 2; ++i) {
    if constexpr (ZERO == 0) {
      to[i] = _mm256_set1_epi8(static_cast<char>(shared));
    } else if constexpr (ZERO == 8) {
      to[i] = BLOCKS == 1 ? twice(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))
                          : twice(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
    } else {  // the first block's in the low halves of bytes
      int64_t held = 0;
      memcpy(&held, from + 8 * i, BLOCKS == 1 ? 4 : 8);
      const __m128i both = _mm_cvtsi64_si128(held);
      const __m128i high = _mm_srli_epi16(both, 4);
      const __m128i made = BLOCKS == 1 ? _mm_unpacklo_epi8(both, high) : _mm_unpacklo_epi64(both, high);
      to[i] = twice(_mm_and_si128(made, _mm_set1_epi8(15)));
    }
  }
}

// Vector j of block k, code - zero, as bytes; or, where these do not hold it, as 16 bits of the even and of the
// odd bytes.
struct Weights {
  __m256i even, odd;
};

EFFC_INLINE Weights weights_of(const uint8_t* chunk, const __m256i* zeros, int k, int j) {
  const __m256i codes = codes_of(chunk, k * VECTORS + j);
  __m256i zero = zeros[k / 2];
  if constexpr (ZERO != 0) {
    __m256i where = load256(SPREAD.of[j]);
    if (k % 2) where = _mm256_add_epi8(where, _mm256_set1_epi8(8));
    zero = _mm256_shuffle_epi8(zero, where);
  }
  if constexpr (!WIDE_CODES) return {_mm256_sub_epi8(codes, zero), zero};
  const __m256i low = _mm256_set1_epi16(255), one = _mm256_and_si256(zero, low);
  return {_mm256_sub_epi16(_mm256_and_si256(codes, low), one), _mm256_sub_epi16(_mm256_srli_epi16(codes, 8), one)};
}

// x where the groups of vector j of a block are.
EFFC_INLINE __m256i gathered(const uint8_t* x, const uint16_t* places, int j) {
  const auto at = [&](int g) { return x + UNIT * static_cast<int64_t>(places[g]); };
  if constexpr (GROUP == 32) return load256(at(j));
  if constexpr (GROUP == 16) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(j)));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(j + 4))), 1);
  }
  const auto two = [&](int g) {
    const __m128d low = _mm_load_sd(reinterpret_cast<const double*>(at(g)));
    return _mm_castpd_si128(_mm_loadh_pd(low, reinterpret_cast<const double*>(at(g + 1))));
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(two(2 * j)), two(4 + 2 * j), 1);
}

EFFC_INLINE __m256i pair_sums(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

// The sum of each four products.
EFFC_INLINE __m256i fours(__m256i x, Weights w) {
  if constexpr (!WIDE_CODES) return pair_sums(_mm256_maddubs_epi16(x, w.even));
  const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(x, 8);
  return _mm256_add_epi32(_mm256_madd_epi16(even, w.even), _mm256_madd_epi16(odd, w.odd));
}

// Sums of neighbours of a, then of b, in each half. NARROW: all numbers fit 16 bits.
constexpr bool NARROW = BITS <= 4 && !WIDE_CODES;  // 8 products of 255 times 15
EFFC_INLINE __m256i neighbours(__m256i a, __m256i b) {
  if constexpr (NARROW) return pair_sums(_mm256_packs_epi32(a, b));
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  const __m256 even = _mm256_shuffle_ps(x, y, 0x88), odd = _mm256_shuffle_ps(x, y, 0xdd);
  return _mm256_add_epi32(_mm256_castps_si256(even), _mm256_castps_si256(odd));
}

// The sums of the eight groups of a block.
template <class W>
EFFC_INLINE __m256i block_sums(const uint8_t* x, const uint16_t* places, W w) {
  const auto two = [&](int j) {
    return neighbours(fours(gathered(x, places, j), w(j)), fours(gathered(x, places, j + 1), w(j + 1)));
  };
  if constexpr (GROUP == 8) return two(0);
  const __m256i low = neighbours(two(0), two(2));
  if constexpr (GROUP == 16) return low;
  constexpr int UPPER = GROUP == 32 ? 4 : 0;
  const __m256i high = neighbours(two(UPPER), two(UPPER + 2));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// Lanes [first, last) of v, others 0 whatever they were.
EFFC_INLINE __m256 lanes_of(__m256 v, int64_t first, int64_t last) {
  alignas(32) static const int32_t upto[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i below = load256(upto + 8 - last), before = load256(upto + 8 - first);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_andnot_si256(before, below)));
}

typedef __m256 Acc;

EFFC_INLINE float total(Acc v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
typedef float Acc;

EFFC_INLINE float total(Acc v) { return v; }
#endif

// ---------------------------------------------------------------- the product

// p: y, x [rows, depth]; where x is codes its rows' scales and what `less` says; chunks, where rows begin in the
// list of groups, then what the epilogue reads. n: the epilogue's address, rows, results, depth, steps
// between rows of x, parts to cut the list into or 0, the zero that all groups share; then the epilogue's.
struct Sparse {
  char* const* p;
  const int64_t* n;
  Epilogue epilogue;
  int64_t rows, results, depth, ldx, parts, zero;
  const float *scales = nullptr, *less = nullptr;  // of each result: 128 times the sum of its weights
  const uint8_t* chunks;
  const int32_t* start;

  Sparse(char* const* p, const int64_t* n)
      : p(p), n(n), epilogue(reinterpret_cast<Epilogue>(n[0])), rows(n[1]), results(n[2]), depth(n[3]), ldx(n[4]),
        parts(n[5]), zero(n[6]) {
    char* const* next = p + 2;
    if (CODES) scales = reinterpret_cast<const float*>(*next++), less = reinterpret_cast<const float*>(*next++);
    chunks = reinterpret_cast<const uint8_t*>(next[0]), start = reinterpret_cast<const int32_t*>(next[1]);
  }

  // The first row whose groups begin at `group` or after it; `results` where none does.
  int64_t first_from(int64_t group) const {
    int64_t low = 0, high = results;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start[middle] < group) low = middle + 1;
      if (start[middle] >= group) high = middle;
    }
    return low;
  }

  // The result of row i of x for a sum over the groups of row r.
  float result(float sum, int64_t i, int64_t r) const { return CODES ? scales[i] * (sum - less[r]) : sum; }
};

// Rows of x as the loops read them: codes without sign, 128 added; or floats.
typedef std::conditional_t<CODES, uint8_t, float> Element;

EFFC_INLINE void line_of(const int8_t* x, uint8_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(x[i] + 128);
}

template <class T>
EFFC_INLINE void line_of(const T* x, float* to, int64_t n) {
  to_floats(x, to, n);
}

struct Lines {
  const Element* x;
  int64_t ld, first, count;
};

// A part of the list, groups [low, high) of it, and what it knows of rows that go across its ends.
struct Part {
  int64_t low, high, row;               // the first row that begins in it
  bool head = false, open = false;      // the row before goes on in it; its last row goes on after it
  float heads[SOME] = {}, tails[SOME] = {};
};

// Sums of a part's rows, one row after the other. ONE: x has a single row.
template <bool ONE>
struct Rows {
  const Sparse& s;
  const Lines& x;
  Part& part;
  int64_t row, end, column, ld;
  float* sums;
  Acc acc[SOME] = {};

  Rows(const Sparse& s, const Lines& x, Part& part)
      : s(s), x(x), part(part), row(part.row - part.head), column(part.row), ld(SUMS / x.count),
        sums(scratch<float>(SUMS)) {
    end = row < s.results ? s.start[row + 1] : part.high;
  }

  int64_t count() const { return ONE ? 1 : x.count; }

  void next() {
    if (row < part.row) {
      for (int64_t i = 0; i < count(); ++i) part.heads[i] = total(acc[i]);
    } else {
      if (row - column == ld) flush();
      for (int64_t i = 0; i < count(); ++i) {
        sums[i * ld + row - column] = s.result(total(acc[i]), x.first + i, row);
      }
    }
    clear();
    ++row;
    end = row < s.results ? s.start[row + 1] : INT64_MAX;
  }

  void clear() {
    for (int64_t i = 0; i < count(); ++i) acc[i] = Acc{};
  }

  void flush() {
    if (row > column) s.epilogue(s.p, s.n + 7, sums, ld, x.first, x.count, column, row - column);
    column = row;
  }

  // All groups are added.
  void finish(bool last) {
    while (row < s.results && end <= part.high && (last || s.start[row] < part.high)) next();
    if (row < part.row) {
      for (int64_t i = 0; i < count(); ++i) part.heads[i] = total(acc[i]);
      return release(sums);
    }
    part.open = row < s.results && s.start[row] < part.high;
    for (int64_t i = 0; i < count() && part.open; ++i) part.tails[i] = total(acc[i]);
    flush();
    release(sums);
  }
};

// Where the codes of group g of a block begin in its vectors.
constexpr int begin_of(int g) {
  return GROUP == 32 ? g * VECTOR : GROUP == 16 ? g % 4 * VECTOR + g / 4 * 16 : g % 4 / 2 * VECTOR + g / 4 * 16 + g % 2 * 8;
}

#if defined(__AVX2__)

// Adds the products of a block's groups, from group `first` of the list on, to their rows' sums. Few blocks hold
// the end of a row; `one` is the sum of a single row of x.
template <bool ONE>
EFFC_INLINE void add_block(Rows<ONE>& rows, int64_t first, const __m256* products, __m256& one) {
  if (EFFC_LIKELY(rows.end >= first + TOGETHER)) {
    if (ONE) one = _mm256_add_ps(one, products[0]);
    for (int64_t i = 0; i < rows.count() && !ONE; ++i) rows.acc[i] = _mm256_add_ps(rows.acc[i], products[i]);
    return;
  }
  if (ONE) rows.acc[0] = one;
  int64_t from = 0;
  for (int64_t until = rows.end - first; rows.end < first + TOGETHER; from = until, until = rows.end - first) {
    for (int64_t i = 0; i < rows.count(); ++i) {
      rows.acc[i] = _mm256_add_ps(rows.acc[i], lanes_of(products[i], from, until));
    }
    rows.next();
  }
  for (int64_t i = 0; i < rows.count(); ++i) {
    rows.acc[i] = _mm256_add_ps(rows.acc[i], lanes_of(products[i], from, TOGETHER));
  }
  if (ONE) one = rows.acc[0];
}

// The groups of a chunk with rows of codes; several rows share what was made of the chunk.
template <bool ONE>
EFFC_INLINE void add_codes(const Sparse& s, Rows<ONE>& rows, int64_t first, const uint8_t* chunk, const uint16_t* places,
                           __m256& one) {
  __m256i zeros[(BLOCKS + 1) / 2];
  zeros_of(chunk, s.zero, zeros);
#pragma GCC unroll 4
  for (int k = 0; k < BLOCKS; ++k) {
    Weights made[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS && !ONE; ++j) made[j] = weights_of(chunk, zeros, k, j);
    const __m256 scale = scales_of(chunk, k);
    __m256 products[ONE ? 1 : SOME];
    for (int64_t i = 0; i < rows.count(); ++i) {
      const __m256i sums = block_sums(rows.x.x + i * rows.x.ld, places + k * TOGETHER, [&](int j) {
        return ONE ? weights_of(chunk, zeros, k, j) : made[j];
      });
      products[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale);
    }
    add_block(rows, first + k * TOGETHER, products, one);
  }
}

// Eight codes from vector bytes as floats.
EFFC_INLINE __m256 floats_of(const uint8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

// Group g of a block with rows of floats.
template <bool ONE>
EFFC_INLINE void add_group(Rows<ONE>& rows, const uint8_t* codes, const float* scales, const float* less,
                           const uint16_t* places, int g) {
  const __m256 scale = _mm256_broadcast_ss(scales + g), off = _mm256_broadcast_ss(less + g);
  const float* x = reinterpret_cast<const float*>(rows.x.x) + UNIT * static_cast<int64_t>(places[g]);
  __m256 w[GROUP / UNIT];
#pragma GCC unroll 4
  for (int e = 0; e < GROUP / UNIT; ++e) w[e] = _mm256_fmadd_ps(floats_of(codes + begin_of(g) + e * UNIT), scale, off);
  for (int64_t i = 0; i < rows.count(); ++i, x += rows.x.ld) {
    Acc sum = rows.acc[i];
#pragma GCC unroll 4
    for (int e = 0; e < GROUP / UNIT; ++e) sum = _mm256_fmadd_ps(w[e], _mm256_loadu_ps(x + e * UNIT), sum);
    rows.acc[i] = sum;
  }
}

// Groups [from, until) of a block with a single row of floats.
EFFC_INLINE void add_to_one(const float* x, const uint8_t* codes, const float* scales, const float* less,
                            const uint16_t* places, int from, int until, __m256& even, __m256& odd) {
#pragma GCC unroll 8
  for (int g = from; g < until; ++g) {
    const __m256 scale = _mm256_broadcast_ss(scales + g), off = _mm256_broadcast_ss(less + g);
    const float* at = x + UNIT * static_cast<int64_t>(places[g]);
#pragma GCC unroll 4
    for (int e = 0; e < GROUP / UNIT; ++e) {
      const __m256 w = _mm256_fmadd_ps(floats_of(codes + begin_of(g) + e * UNIT), scale, off);
      __m256& sum = e % 2 ? odd : even;
      sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(at + e * UNIT), sum);
    }
  }
}

template <bool ONE>
EFFC_INLINE void add_floats(const Sparse& s, Rows<ONE>& rows, int64_t first, const uint8_t* chunk,
                            const uint16_t* places, __m256& even, __m256& odd) {
  __m256i zeros[(BLOCKS + 1) / 2];
  zeros_of(chunk, s.zero, zeros);
#pragma GCC unroll 4
  for (int k = 0; k < BLOCKS; ++k, first += TOGETHER, places += TOGETHER) {
    alignas(32) float scale[TOGETHER], off[TOGETHER];
    const __m256 scales = scales_of(chunk, k);
    const __m128i zero = k % 2 ? _mm256_extracti128_si256(_mm256_srli_si256(zeros[k / 2], 8), 0) : _mm256_castsi256_si128(zeros[k / 2]);
    _mm256_store_ps(scale, scales);
    _mm256_store_ps(off, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(zero)), _mm256_sub_ps(_mm256_setzero_ps(), scales)));
    alignas(32) uint8_t codes[VECTORS * VECTOR];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + j * VECTOR), codes_of(chunk, k * VECTORS + j));
    }
    const float* x = reinterpret_cast<const float*>(rows.x.x);
    if (ONE && EFFC_LIKELY(rows.end >= first + TOGETHER)) {
      add_to_one(x, codes, scale, off, places, 0, TOGETHER, even, odd);
      continue;
    }
    int from = 0;
    for (; ONE && rows.end < first + TOGETHER; rows.next()) {
      const int until = static_cast<int>(rows.end - first);
      add_to_one(x, codes, scale, off, places, from, until, even, odd);
      rows.acc[0] = _mm256_add_ps(even, odd);
      even = odd = _mm256_setzero_ps();
      from = until;
    }
    if (ONE) add_to_one(x, codes, scale, off, places, from, TOGETHER, even, odd);
    for (int g = 0; g < TOGETHER && !ONE; ++g) {
      while (rows.end == first + g) rows.next();
      add_group(rows, codes, scale, off, places, g);
    }
  }
}
#else

// The zeros of a chunk's groups.
EFFC_INLINE void zeros_of(const uint8_t* chunk, int64_t shared, int (&to)[GROUPS]) {
  const uint8_t* from = chunk + CODE_BYTES + SCALE_BYTES;
  for (int g = 0; g < GROUPS; ++g) {
    if constexpr (ZERO == 0) to[g] = static_cast<int>(shared);
    if constexpr (ZERO == 8) to[g] = from[g];
    if constexpr (ZERO == 4 && BLOCKS == 1) to[g] = from[g / 2] >> g % 2 * 4 & 15;
    if constexpr (ZERO == 4 && BLOCKS > 1) to[g] = from[g / 16 * 8 + g % 8] >> g % 16 / 8 * 4 & 15;
  }
}

EFFC_INLINE void scales_of(const uint8_t* chunk, float* to) {
  if constexpr (std::is_same_v<Scale, float>) memcpy(to, chunk + CODE_BYTES, SCALE_BYTES);
  if constexpr (!std::is_same_v<Scale, float>) load_row(reinterpret_cast<const Scale*>(chunk + CODE_BYTES), to, GROUPS);
}

// Code e of group g of a chunk.
EFFC_INLINE int code_at(const uint8_t* chunk, int g, int e) {
  const int at = g / TOGETHER * VECTORS * VECTOR + begin_of(g % TOGETHER) + e, vector = at / VECTOR, byte = at % VECTOR;
  int made = 0;
  for (int width = 4, done = 0; width; width /= 2) {
    if (BITS == 8) return chunk[at];
    if (!(BITS & width)) continue;
    const int held = chunk[(done + vector % width) * VECTOR + byte] >> vector / width * width;
    made |= (held & ((1 << width) - 1)) << done;
    done += width;
  }
  return made;
}

// The groups of a chunk, one after the other.
template <bool ONE>
static void add_plainly(const Sparse& s, Rows<ONE>& rows, int64_t first, const uint8_t* chunk, const uint16_t* places) {
  float scales[GROUPS];
  int zeros[GROUPS];
  scales_of(chunk, scales);
  zeros_of(chunk, s.zero, zeros);
  for (int g = 0; g < GROUPS; ++g) {
    while (rows.end == first + g) rows.next();
    int w[GROUP];
    for (int e = 0; e < GROUP; ++e) w[e] = code_at(chunk, g, e) - zeros[g];
    for (int64_t i = 0; i < rows.count(); ++i) {
      const Element* x = rows.x.x + i * rows.x.ld + UNIT * static_cast<int64_t>(places[g]);
      std::conditional_t<CODES, int32_t, float> sum = 0;
      for (int e = 0; e < GROUP; ++e) sum += static_cast<decltype(sum)>(w[e]) * static_cast<decltype(sum)>(x[e]);
      rows.acc[i] += scales[g] * static_cast<float>(sum);
    }
  }
}
#endif

template <bool ONE>
static void compute(const Sparse& s, const Lines& x, Part& part, bool last) {
  Rows<ONE> rows(s, x, part);
#if defined(__AVX2__)
  __m256 even = {}, odd = {};  // the sum of a single row of x
#endif
  for (int64_t g = part.low; g < part.high; g += GROUPS) {
    const uint8_t* chunk = s.chunks + g / GROUPS * CHUNK_BYTES;
    const uint16_t* places = reinterpret_cast<const uint16_t*>(chunk + CHUNK_BYTES) - GROUPS;
    for (int64_t i = 0; i < CHUNK_BYTES; i += 64) __builtin_prefetch(chunk + AHEAD + i);
#if defined(__AVX2__)
    if constexpr (CODES) add_codes(s, rows, g, chunk, places, even);
    if constexpr (!CODES) add_floats(s, rows, g, chunk, places, even, odd);
#else
    add_plainly(s, rows, g, chunk, places);
#endif
  }
#if defined(__AVX2__)
  if (ONE) rows.acc[0] = _mm256_add_ps(even, odd);
#endif
  rows.finish(last);
}

// Rows that go across ends of parts: what the parts have of each, in order.
static void add_rows_across(const Sparse& s, const Lines& x, const Part* parts, int64_t count) {
  float sums[SOME];
  for (int64_t k = 0; k < count; ++k) {
    if (!parts[k].open) continue;
    memcpy(sums, parts[k].tails, sizeof(sums));
    const int64_t row = (k + 1 < count ? parts[k + 1].row : s.results) - 1;
    for (int64_t next = k + 1; next < count && parts[next].head && parts[next].row == row + 1; ++next) {
      for (int64_t i = 0; i < x.count; ++i) sums[i] += parts[next].heads[i];
    }
    for (int64_t i = 0; i < x.count; ++i) sums[i] = s.result(sums[i], x.first + i, row);
    s.epilogue(s.p, s.n + 7, sums, 1, x.first, x.count, row, 1);
  }
}

static void sparse(char* const* p, const int64_t* n, int64_t threads) {
  const Sparse s(p, n);
  if (s.rows == 0 || s.results == 0) return;
  const int64_t groups = s.start[s.results], chunks = (groups + GROUPS - 1) / GROUPS;
  const int64_t wanted = s.parts ? s.parts : least(threads, 1 + chunks * CHUNK_BYTES * (1 + s.rows / 4) / WORTH);
  const int64_t each = (chunks + wanted - 1) / wanted, count = each ? (chunks + each - 1) / each : 1;
  Part* parts = scratch<Part>(count);
  for (int64_t k = 0; k < count; ++k) {
    Part& part = parts[k] = Part();
    part.low = k * each * GROUPS, part.high = least((k + 1) * each * GROUPS, groups);
    part.row = s.first_from(part.low);
    part.head = part.row == s.results ? part.low < groups : s.start[part.row] > part.low;
  }
  const int64_t ld = up(s.depth, VECTOR);
  Element* lines = scratch<Element>(least(s.rows, SOME) * ld);
  for (int64_t first = 0; first < s.rows; first += SOME) {
    const Lines x = {lines, ld, first, least(SOME, s.rows - first)};
    for (int64_t i = 0; i < x.count; ++i) {
      const X* from = reinterpret_cast<const X*>(p[1]) + (first + i) * s.ldx;
      line_of(from, lines + i * ld, s.depth);
    }
    parallel_for(count, 1, threads, [=](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (x.count == 1) compute<true>(s, x, parts[k], k + 1 == count);
        if (x.count > 1) compute<false>(s, x, parts[k], k + 1 == count);
      }
    });
    add_rows_across(s, x, parts, count);
  }
  release(lines), release(parts);
}
}  // namespace
}  // namespace effc
