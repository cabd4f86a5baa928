// A matrix of codes with a scale and zero for every group of a row, as products and look-ups read it.
#pragma once

#include "effc_codes.h"

namespace effc {
namespace {

constexpr int64_t AT_ONCE = 4096;     // sums of few rows between two calls of the epilogue
constexpr int64_t WORTH = 128 << 10;  // bytes to read that are worth a thread: about 10 us
constexpr int64_t FEW = 8;            // rows: with more, unpacking ahead pays

template <class T>
EFFC_INLINE void floats_at(const void* from, int64_t first, float* to, int64_t n) {
  to_floats(static_cast<const T*>(from) + first, to, n);
}

// n floats of a type that is known by number.
EFFC_INLINE void floats_of_kind(int64_t kind, const void* from, int64_t first, float* to, int64_t n) {
  if (kind == 0) floats_at<float>(from, first, to, n);
  if (kind == 1) floats_at<half>(from, first, to, n);
  if (kind == 2) floats_at<bf16>(from, first, to, n);
}

// WIDTH of them as a vector.
EFFC_INLINE vec vec_of_kind(int64_t kind, const void* from, int64_t first) {
  if (kind == 0) return widen(static_cast<const float*>(from) + first);
  if (kind == 2) return widen(static_cast<const bf16*>(from) + first);
#if defined(__F16C__) && defined(__AVX2__) && !defined(__AVX512F__) && !defined(EFFC_WIDE)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const half*>(from) + first)));
#else
  return widen(static_cast<const half*>(from) + first);
#endif
}

EFFC_INLINE int64_t common(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Which tiles are computed together.
template <int COUNT>
struct Tiles {
  const uint8_t* codes[COUNT];
  int64_t scale[COUNT];  // the place of their first
  const uint8_t* zero[COUNT];
  int64_t column[COUNT];  // of their sums

  Tiles<COUNT / 2> half(int which) const {
    Tiles<COUNT / 2> some;
    for (int t = 0; t < COUNT / 2; ++t) {
      const int of = which * COUNT / 2 + t;
      some.codes[t] = codes[of], some.scale[t] = scale[of], some.zero[t] = zero[of], some.column[t] = column[of];
    }
    return some;
  }
};

// w as it lies: for WIDTH rows at a time their units; their scales, group after group; likewise zeros.
struct Weight {
  const uint8_t* codes;
  const void* scale;
  const uint8_t* zero;  // none: all are `offset`
  int64_t results, depth, units, group, groups, kind, offset;

  Weight(const char* codes, const char* scale, const char* zero, int64_t results, int64_t depth, int64_t group,
         int64_t kind, int64_t offset, bool zeros)
      : codes(reinterpret_cast<const uint8_t*>(codes)), scale(scale),
        zero(zeros ? reinterpret_cast<const uint8_t*>(zero) : nullptr), results(results), depth(depth),
        units((depth + UNIT - 1) / UNIT), group(group ? group : units),
        groups(group ? (units + group - 1) / group : 1), kind(kind), offset(offset) {}

  int64_t tiles() const { return (results + WIDTH - 1) / WIDTH; }
  template <int BITS>
  const uint8_t* codes_of(int64_t tile) const { return codes + tile * units * UNIT_BYTES<BITS>; }
  const uint8_t* zeros_of(int64_t tile) const { return zero ? zero + tile * groups * WIDTH : nullptr; }
  vec scales_at(int64_t place) const { return vec_of_kind(kind, scale, place); }

  // STREAMS tiles from the first on that are `apart`, all before `end`: the last one instead of those behind it.
  // Their sums begin where those of the tile `begin` do.
  template <int BITS>
  Tiles<STREAMS> some(int64_t first, int64_t apart, int64_t begin, int64_t end) const {
    Tiles<STREAMS> of;
    for (int t = 0; t < STREAMS; ++t) {
      const int64_t tile = least(first + t * apart, end - 1);
      of.codes[t] = codes_of<BITS>(tile), of.zero[t] = zeros_of(tile), of.scale[t] = tile * groups * WIDTH;
      of.column[t] = (tile - begin) * WIDTH;
    }
    return of;
  }
};

// Zeros of WIDTH rows.
EFFC_INLINE sums32 zeros_at(const uint8_t* p) {
  typedef uint8_t narrow __attribute__((vector_size(WIDTH), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const narrow*>(p), sums32);
}

}  // namespace
}  // namespace effc
