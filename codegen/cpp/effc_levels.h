// Codes of five levels, 0 to 4, as products read them: 2.4 bits each.
//
// Five codes c0 ... c4 are the number v = c0 5^4 + ... + c4 and lie as the fraction ceil(v 2^12 / 5^5) / 2^12, of which
// multiplying by 5 takes one digit after the other: the first is the whole part of five times it. As 5^5 < 2^12
// no digit is wrong. A bundle is FIVE units (effc_codes.h) of each of WIDTH rows; digit d of its fractions
// belongs to unit d. Two fractions a row make a vector of 16 bits a lane; the even ones of a run of four codes lie in
// one vector and the odd ones in the next, so that digits of both are bytes in order. Three vectors hold four:
// each of three in the upper 12 bits, and the fourth in 4 bits of each. (ABQ-LLM, arXiv 2408.08554, section 2.2;
// the packing is ours.)
#pragma once

#include "effc_codes.h"

namespace effc {

constexpr int FIVE = 5;
constexpr int LEVEL_BITS = 3;                     // of a code by itself
constexpr int64_t BUNDLE_BYTES = 12 * LANES;      // FIVE * UNIT * WIDTH codes of 12 / 5 bits

// The upper 16 bits of each number times 5.
EFFC_INLINE shorts whole_fives(shorts v) {
#if defined(__AVX512BW__)
  return (shorts)_mm512_mulhi_epu16((__m512i)v, _mm512_set1_epi16(FIVE));
#elif defined(__AVX2__) && !defined(EFFC_WIDE)
  return (shorts)_mm256_mulhi_epu16((__m256i)v, _mm256_set1_epi16(FIVE));
#else
  const words low = ((words)v & 0xffffu) * FIVE >> 16, high = ((words)v >> 16) * FIVE & 0xffff0000u;
  return (shorts)(low | high);
#endif
}

// The fractions of two runs of every lane, even and odd ones of the first, then of the second.
EFFC_INLINE void fractions(const uint8_t* from, shorts (&to)[4]) {
  const shorts* v = reinterpret_cast<const shorts*>(from);
  to[0] = v[0] & 0xfff0, to[1] = v[1] & 0xfff0, to[2] = v[2] & 0xfff0;
  to[3] = (v[0] << 12) | ((v[1] & 15) << 8) | ((v[2] & 15) << 4);
}

// f(j, d, bytes) for every vector j of unit d of a bundle.
template <class F>
EFFC_INLINE void each_vector(const uint8_t* bundle, F f) {
#pragma GCC unroll 4
  for (int h = 0; h < RUNS / 2; ++h) {
    shorts v[4];
    fractions(bundle + 3 * LANES * h, v);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      shorts even = v[2 * r], odd = v[2 * r + 1];
#pragma GCC unroll 5
      for (int d = 0; d < FIVE; ++d) {
        f(2 * h + r, d, whole_fives(even) | (whole_fives(odd) << 8));
        even *= FIVE, odd *= FIVE;
      }
    }
  }
}

// A row of bundles as units of bytes.
EFFC_INLINE void unpack_levels(const uint8_t* from, int64_t units, uint8_t* to) {
  for (int64_t u = 0; u < units; u += FIVE, from += BUNDLE_BYTES) {
    const int64_t held = least(FIVE, units - u);
    each_vector(from, [&](int j, int d, shorts v) {
      if (d < held) reinterpret_cast<shorts*>(to + (u + d) * UNIT_BYTES<8>)[j] = v;
    });
  }
}

}  // namespace effc
