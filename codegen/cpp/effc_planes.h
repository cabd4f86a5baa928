// x w^T of codes by their bits: the sum over planes i of x and j of w of 2^(i + j) popcount(x_i AND w_j).
// (ABQ-LLM, arXiv 2408.08554, section 2.8)
//
// Codes are unsigned here; what was taken off them, a zero or half of a signed range, comes back afterwards through
// the sums of codes: sum (w - a)(x - b) = sum w x - a sum x - b sum w + depth a b. A line is LINE codes of a row: BITS
// planes of LINE bits each, one after the other. Counts of all pairs of planes with the same i + j are one number.
// P, Q: bits of x and of w. Sums are 64-bit integers, so none is wrong.
#pragma once

#include "effc_rows.h"

namespace effc {
namespace {

constexpr int64_t LINE = 256, LINE_BYTES = LINE / 8;
constexpr int64_t SUMS = 4096;        // sums between two calls of the epilogue
constexpr int64_t WORTH = 128 << 10;  // bytes to read that are worth a thread: about 10 us

#if defined(__AVX2__)
typedef __m256i Bits;
EFFC_INLINE Bits line_of(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
EFFC_INLINE Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }

EFFC_INLINE int64_t total(Bits v) {
  int64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512VL__)
constexpr int AT_MOST = 1 << 30;  // counts in a lane between two times they are gathered
EFFC_INLINE Bits counted(Bits v) { return _mm256_popcnt_epi64(v); }
EFFC_INLINE Bits plus(Bits a, Bits b) { return _mm256_add_epi64(a, b); }
EFFC_INLINE Bits gathered(Bits v) { return v; }
#else
constexpr int AT_MOST = 31;  // of 8 bits each in a byte
// Set bits of every byte: a table of those of four.
EFFC_INLINE Bits counted(Bits v) {
  const Bits table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3,
                                      2, 3, 3, 4);
  const Bits four = _mm256_set1_epi8(15);
  const Bits low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, four));
  return _mm256_add_epi8(low, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), four)));
}
EFFC_INLINE Bits plus(Bits a, Bits b) { return _mm256_add_epi8(a, b); }
EFFC_INLINE Bits gathered(Bits v) { return _mm256_sad_epu8(v, _mm256_setzero_si256()); }
#endif
EFFC_INLINE Bits sum(Bits a, Bits b) { return _mm256_add_epi64(a, b); }
EFFC_INLINE Bits nothing() { return _mm256_setzero_si256(); }
#else
struct Bits {
  uint64_t of[LINE / 64];
};
constexpr int AT_MOST = 1 << 30;
EFFC_INLINE Bits line_of(const uint8_t* p) {
  Bits v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class F>
EFFC_INLINE Bits made(F f) {
  Bits v;
  for (int i = 0; i < LINE / 64; ++i) v.of[i] = f(i);
  return v;
}
EFFC_INLINE Bits both(Bits a, Bits b) { return made([&](int i) { return a.of[i] & b.of[i]; }); }
EFFC_INLINE Bits counted(Bits v) { return made([&](int i) -> uint64_t { return __builtin_popcountll(v.of[i]); }); }
EFFC_INLINE Bits plus(Bits a, Bits b) { return made([&](int i) { return a.of[i] + b.of[i]; }); }
EFFC_INLINE Bits gathered(Bits v) { return v; }
EFFC_INLINE Bits sum(Bits a, Bits b) { return plus(a, b); }
EFFC_INLINE Bits nothing() { return {}; }
EFFC_INLINE int64_t total(Bits v) { return static_cast<int64_t>(v.of[0] + v.of[1] + v.of[2] + v.of[3]); }
#endif

// The sum of products of a row of x and one of w.
template <int P, int Q>
static int64_t product(const uint8_t* x, const uint8_t* w, int64_t lines) {
  constexpr int PAIRS = P < Q ? P : Q, STEP = AT_MOST / PAIRS;  // pairs of planes of the same i + j; lines
  Bits sums[P + Q - 1];
  for (int d = 0; d < P + Q - 1; ++d) sums[d] = nothing();
  for (int64_t k = 0; k < lines;) {
    const int64_t end = least(lines, k + STEP);
    Bits counts[P + Q - 1];
    for (int d = 0; d < P + Q - 1; ++d) counts[d] = nothing();
    for (; k < end; ++k, x += P * LINE_BYTES, w += Q * LINE_BYTES) {
#pragma GCC unroll 8
      for (int j = 0; j < Q; ++j) {
        const Bits right = line_of(w + j * LINE_BYTES);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) {
          counts[i + j] = plus(counts[i + j], counted(both(line_of(x + i * LINE_BYTES), right)));
        }
      }
    }
    for (int d = 0; d < P + Q - 1; ++d) sums[d] = sum(sums[d], gathered(counts[d]));
  }
  int64_t found = 0;
  for (int d = 0; d < P + Q - 1; ++d) found += total(sums[d]) << d;
  return found;
}

// n codes as planes, the last line filled up with zeros; what they sum to.
template <int P>
static int64_t to_planes(const uint8_t* codes, int64_t shift, int64_t n, uint8_t* to) {
  int64_t found = 0;
  for (int64_t k = 0; k < n; k += LINE, to += P * LINE_BYTES) {
    uint8_t line[LINE] = {};
    for (int64_t i = 0; i < least(LINE, n - k); ++i) {
      line[i] = static_cast<uint8_t>(codes[k + i] - shift);
      found += line[i];
    }
    for (int i = 0; i < P; ++i) {
      for (int64_t b = 0; b < LINE_BYTES; b += 4) {
#if defined(__AVX2__)
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 8 * b));
        const int32_t word = _mm256_movemask_epi8(_mm256_slli_epi16(some, 7 - i));
        memcpy(to + i * LINE_BYTES + b, &word, sizeof(word));
#else
        for (int64_t c = b; c < b + 4; ++c) {
          int byte = 0;
          for (int e = 0; e < 8; ++e) byte |= (line[8 * c + e] >> i & 1) << e;
          to[i * LINE_BYTES + c] = static_cast<uint8_t>(byte);
        }
#endif
      }
    }
  }
  return found;
}

// p: y, codes of x [rows, depth], its rows' scales and zeros; w's lines, its scales (float), its offsets and the sums of
// its stored codes (int32), one a row; then what the epilogue reads. n: the epilogue's address, rows, results, depth,
// steps between rows of x, its least code, whether it has zeros: 1 signed ones, 2 others; then the epilogue's.
template <int P, int Q>
static void linear_of_planes(char* const* p, const int64_t* n, int64_t threads) {
  const Epilogue epilogue = reinterpret_cast<Epilogue>(n[0]);
  const int64_t rows = n[1], results = n[2], depth = n[3], ldx = n[4], shift = n[5], zeros = n[6];
  const int64_t lines = (depth + LINE - 1) / LINE;
  if (rows == 0 || results == 0) return;
  uint8_t* planes = scratch<uint8_t>(rows * lines * P * LINE_BYTES);
  int64_t* sums_of_x = scratch<int64_t>(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p[1]) + i * ldx;
    sums_of_x[i] = to_planes<P>(from, shift, depth, planes + i * lines * P * LINE_BYTES);
  }
  const int64_t each = lines * Q * LINE_BYTES * (1 + rows * P / 2);
  parallel_for(results, 1 + WORTH / (each + 1), threads, [=](int64_t begin, int64_t end) {
    const float *x_scale = reinterpret_cast<const float*>(p[2]), *w_scale = reinterpret_cast<const float*>(p[5]);
    const int32_t *offset = reinterpret_cast<const int32_t*>(p[6]), *sums_of_w = reinterpret_cast<const int32_t*>(p[7]);
    const int64_t most = up((SUMS + rows - 1) / rows, 16);
    float* sums = scratch<float>(rows * most);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t count = least(most, end - first);
      for (int64_t r = first; r < first + count; ++r) {
        const uint8_t* w = reinterpret_cast<const uint8_t*>(p[4]) + r * lines * Q * LINE_BYTES;
        for (int64_t i = 0; i < rows; ++i) {
          const uint8_t zero = zeros ? reinterpret_cast<const uint8_t*>(p[3])[i] : 0;
          const int64_t less = (zeros == 1 ? static_cast<int8_t>(zero) : zero) - shift;
          const int64_t found = product<P, Q>(planes + i * lines * P * LINE_BYTES, w, lines) - offset[r] * sums_of_x[i] -
                                less * sums_of_w[r] + depth * less * offset[r];
          sums[i * most + r - first] = static_cast<float>(found) * (w_scale[r] * x_scale[i]);
        }
      }
      epilogue(p, n + 7, sums, most, 0, rows, first, count);
    }
    release(sums);
  });
  release(planes), release(sums_of_x);
}

}  // namespace
}  // namespace effc
