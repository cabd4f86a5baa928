// Codes of 1 to 8 bits as products read them: WIDTH rows of a matrix together, so that each row has a
// lane of every vector, and no sum goes across lanes.
//
// A unit is UNIT codes of each of the WIDTH rows in 4 * WIDTH * BITS bytes, which unpack to RUNS vectors of
// bytes: lane l of vector j holds codes 4j ... 4j + 3 of row l. Signed codes are stored with half their range
// added, so that all are unsigned. A code of 3, 5, 6 or 7 bits is split into parts of 4, 2 and 1 bits, the
// lowest first; vectors of a unit share the bytes of a part: two of them a part of 4 bits, four one of 2,
// and all eight one of a single bit. Units of the same rows lie one after the other.
#pragma once

#include "effc_rows.h"

namespace effc {

constexpr int64_t UNIT = 32;
constexpr int RUN = 4, RUNS = UNIT / RUN;  // codes in a lane, and vectors of them
constexpr int64_t LANES = 4 * WIDTH;       // bytes of a vector
constexpr int64_t AHEAD = 1024;            // bytes

template <int BITS>
constexpr int64_t UNIT_BYTES = LANES * BITS;

typedef uint8_t bytes __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef uint16_t shorts __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef uint32_t words __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef int16_t sums16 __attribute__((vector_size(WIDTH * 4), may_alias));
typedef int32_t sums32 __attribute__((vector_size(WIDTH * 4), may_alias));

// ---------------------------------------------------------------- unpacking

// Bits of `from` on as bits of `to` on, by left or right shift; the caller masks what came along.
EFFC_INLINE shorts moved(shorts v, int from, int to) { return from > to ? v >> (from - to) : v << (to - from); }

// Vector j of a unit as bytes.
template <int BITS>
EFFC_INLINE shorts unpack(const uint8_t* unit, int j) {
  const shorts* v = reinterpret_cast<const shorts*>(unit);
  if constexpr (BITS == 8) return v[j];
  constexpr int QUARTERS = BITS & 4 ? 4 : 0, PAIRS = BITS & 2 ? 2 : 0;  // vectors of each part before the next
  shorts made = {};
  if constexpr (QUARTERS) made = moved(v[j / 2], j % 2 * 4, 0) & 0x0f0f;
  if constexpr (PAIRS) made |= moved(v[QUARTERS + j / 4], j % 4 * 2, QUARTERS) & static_cast<uint16_t>(0x0303 << QUARTERS);
  if constexpr (BITS & 1) made |= moved(v[QUARTERS + PAIRS], j, BITS - 1) & static_cast<uint16_t>(0x0101 << (BITS - 1));
  return made;
}

// The same of row l alone: codes 4j ... 4j + 3 in the bytes of a word.
template <int BITS>
EFFC_INLINE uint32_t unpack_one(const uint8_t* unit, int j, int64_t l) {
  uint32_t v[BITS];
  for (int i = 0; i < BITS; ++i) memcpy(&v[i], unit + i * LANES + l * RUN, sizeof(*v));
  if constexpr (BITS == 8) return v[j];
  constexpr int QUARTERS = BITS & 4 ? 4 : 0, PAIRS = BITS & 2 ? 2 : 0;
  uint32_t made = 0;
  if constexpr (QUARTERS) made = v[j / 2] >> j % 2 * 4 & 0x0f0f0f0fu;
  if constexpr (PAIRS) made |= (v[QUARTERS + j / 4] >> j % 4 * 2 & 0x03030303u) << QUARTERS;
  if constexpr (BITS & 1) made |= (v[QUARTERS + PAIRS] >> j & 0x01010101u) << (BITS - 1);
  return made;
}

// What codes are counted from where they become floats: the middle of their range, for sums of either sign.
template <int BITS>
constexpr int MIDDLE = 1 << (BITS - 1);
constexpr float RAISED = 1 << 24;  // floats of codes are so many times as large: a code is a word's highest byte

template <int BITS>
EFFC_INLINE shorts from_middle(shorts v) {
  return (shorts)((bytes)v - static_cast<uint8_t>(MIDDLE<BITS>));
}

// Byte e of every lane of a vector, signed, RAISED.
EFFC_INLINE vec raised(shorts v, int e) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(EFFC_WIDE)
  const char o = static_cast<char>(-128), i = static_cast<char>(e);
  const __m256i places = _mm256_setr_epi8(
      o, o, o, i, o, o, o, 4 + i, o, o, o, 8 + i, o, o, o, 12 + i,
      o, o, o, i, o, o, o, 4 + i, o, o, o, 8 + i, o, o, o, 12 + i);
  return (vec)_mm256_cvtepi32_ps(_mm256_shuffle_epi8((__m256i)v, places));
#else
  return __builtin_convertvector((sums32)((words)v << (24 - 8 * e) & 0xff000000u), vec);
#endif
}

// The unit after this one. What comes later is on its way from memory by then (measured: a quarter faster).
template <int BITS>
EFFC_INLINE const uint8_t* next_unit(const uint8_t* unit) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < UNIT_BYTES<BITS>; i += 64) __builtin_prefetch(unit + i + AHEAD);
  return unit + UNIT_BYTES<BITS>;
}

// ---------------------------------------------------------------- products of bytes

// In each pair of bytes the sum of unsigned times signed; nothing may exceed 16 bits.
EFFC_INLINE sums16 pair_products(shorts u, sums32 s) {
#if defined(__AVX512BW__)
  return (sums16)_mm512_maddubs_epi16((__m512i)u, (__m512i)s);
#elif defined(__AVX2__) && !defined(EFFC_WIDE)
  return (sums16)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
#else
  const sums16 low = ((sums16)s << 8) >> 8, high = (sums16)s >> 8;
  return (sums16)(u & 0xff) * low + (sums16)(u >> 8) * high;
#endif
}

// The sum of each pair of 16 bits.
EFFC_INLINE sums32 pair_sums(sums16 v) {
#if defined(__AVX512BW__)
  return (sums32)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(EFFC_WIDE)
  return (sums32)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#else
  return (((sums32)v << 16) >> 16) + ((sums32)v >> 16);
#endif
}

// A sum that is there now, in a register: g++ would make all products first, and spill them.
template <class V>
EFFC_INLINE void keep(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__) && !defined(EFFC_WIDE)
  asm("" : "+x"(v));
#endif
}

// So many products of two bytes may be added in 16 bits: signed ones with codes of so many bits.
template <int BITS>
constexpr int STEPS16 = 32767 / (2 * ((1 << BITS) - 1) * 128) < RUNS ? 32767 / (2 * ((1 << BITS) - 1) * 128) : RUNS;

EFFC_INLINE sums32 four_codes(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof(four));
  return four - (sums32){};
}

// sums[i][t] += the products of a unit of rows t with UNIT codes of row i of x. PACKED: how many bits a code
// has in memory; BITS: how many it has.
template <int BITS, int PACKED, int ROWS, int TILES>
EFFC_INLINE void add_unit(const int8_t* x, int64_t ldx, const uint8_t* const (&w)[TILES],
                          sums32 (&sums)[ROWS][TILES]) {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__) && !defined(EFFC_WIDE))
#pragma GCC unroll 8
  for (int j = 0; j < RUNS; ++j) {
    shorts codes[TILES];
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) codes[t] = unpack<PACKED>(w[t], j);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const sums32 four = four_codes(x + i * ldx + j * RUN);
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) {
#if defined(__AVX512VNNI__)
        sums[i][t] = (sums32)_mm512_dpbusd_epi32((__m512i)sums[i][t], (__m512i)codes[t], (__m512i)four);
#else
        sums[i][t] = (sums32)_mm256_dpbusd_avx_epi32((__m256i)sums[i][t], (__m256i)codes[t], (__m256i)four);
#endif
      }
    }
  }
#else
  // Two of 8 bits times 8 are more than 16 bits hold: halves of 4 bits are multiplied, each for itself.
  constexpr int HALVES = BITS == 8 ? 2 : 1, STEPS = STEPS16<BITS == 8 ? 4 : BITS>;
  sums16 some[HALVES][ROWS][TILES] = {};
#pragma GCC unroll 8
  for (int j = 0; j < RUNS; ++j) {
    shorts codes[HALVES][TILES];
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      const shorts v = unpack<PACKED>(w[t], j);
      codes[0][t] = HALVES == 2 ? v & 0x0f0f : v;
      if constexpr (HALVES == 2) codes[1][t] = (v >> 4) & 0x0f0f;
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const sums32 four = four_codes(x + i * ldx + j * RUN);
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) {
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
          const sums16 two = pair_products(codes[h][t], four);
          some[h][i][t] = j % STEPS ? some[h][i][t] + two : two;
          keep(some[h][i][t]);
          if ((j + 1) % STEPS == 0 || j + 1 == RUNS) sums[i][t] += pair_sums(some[h][i][t]) << 4 * h;
        }
      }
    }
  }
#endif
}

}  // namespace effc
