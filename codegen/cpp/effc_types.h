// Storage types and casts. Kernels compute in float (or double); bf16 and half only live in memory.
#pragma once

namespace effc {

template <class To, class From>
EFFC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A target with instructions for these has defined them before.
#ifndef EFFC_CONVERSIONS
namespace detail {

EFFC_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  // Adding 0x7fff and the kept bit rounds to nearest even; a carry into the exponent is the right
  // answer. A NaN would carry into infinity, so it becomes the quiet NaN torch writes.
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

EFFC_INLINE float bf16_to_float(uint16_t b) {
  return bit_cast<float>(static_cast<uint32_t>(b) << 16);
}

// Half in integer arithmetic: g++ 12 vectorises this, and neither the F16C intrinsics nor _Float16.
// Signed, because AVX2 has no unsigned compare; the sign bit is always taken off first.
EFFC_INLINE float half_to_float(uint16_t h) {
  const int32_t body = (h & 0x7fff) << 13;
  // A denormal half is 2^-14 * 0.f: put f under the exponent of 2^-14 and subtract 2^-14 again.
  const float tiny = bit_cast<float>(body + (113 << 23)) - bit_cast<float>(113 << 23);
  const int32_t normal = body + (112 << 23);  // 112 = 127 - 15, the two exponent biases
  int32_t out = body < (1 << 23) ? bit_cast<int32_t>(tiny) : normal;
  out = body >= (31 << 23) ? body | 0x7f800000 : out;  // infinity and NaN
  return bit_cast<float>(static_cast<uint32_t>(out) | (static_cast<uint32_t>(h & 0x8000) << 16));
}

EFFC_INLINE uint16_t float_to_half(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const int32_t magnitude = static_cast<int32_t>(u & 0x7fffffffu);
  const int32_t a = magnitude > 0x47800000 ? 0x47800000 : magnitude;  // 2^16 rounds to infinity
  const int32_t rounded = (a - (112 << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Adding 0.5 lines the last kept bit of a denormal half up with the last bit of a float.
  const int32_t tiny = bit_cast<int32_t>(bit_cast<float>(a) + 0.5f) - (126 << 23);
  int32_t out = a < (113 << 23) ? tiny : rounded;
  out = x != x ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : out;
  return static_cast<uint16_t>(static_cast<uint32_t>(out) | ((u >> 16) & 0x8000u));
}

}  // namespace detail
#endif

// `y[i] = x` with a float on the right goes through operator=, not through a temporary: g++ gives a
// temporary struct inside an `omp simd` loop an array of its own and then does not vectorise.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  EFFC_MEMBER bf16(float x) : bits(detail::float_to_bf16(x)) {}
  EFFC_MEMBER bf16& operator=(float x) {
    bits = detail::float_to_bf16(x);
    return *this;
  }
  EFFC_MEMBER operator float() const { return detail::bf16_to_float(bits); }
};

struct half {
  uint16_t bits;
  half() = default;
  EFFC_MEMBER half(float x) : bits(detail::float_to_half(x)) {}
  EFFC_MEMBER half& operator=(float x) {
    bits = detail::float_to_half(x);
    return *this;
  }
  EFFC_MEMBER operator float() const { return detail::half_to_float(bits); }
};

static_assert(sizeof(bf16) == 2 && sizeof(half) == 2, "storage types have the size torch gives them");

// `cast<To>(x)` is `x.to(To)`. A float that does not fit an integer gives what torch's CPU gives
// for the types where that is defined (unsigned 8 bit wraps through 64 bit), else anything.
template <class To, class From>
EFFC_INLINE To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, bf16> || std::is_same_v<From, half>) {
    return cast<To>(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, bf16> || std::is_same_v<To, half>) {
    return To(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, bool>) {
    return x != From(0);
  } else if constexpr (std::is_floating_point_v<From> && std::is_unsigned_v<To>) {
    return static_cast<To>(static_cast<int64_t>(x));
  } else {
    return static_cast<To>(x);
  }
}

// What memory gives to arithmetic, and back: `float v = load(p + i); store(q + i, v);`
template <class T>
EFFC_INLINE auto load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    return detail::bf16_to_float(p->bits);
  } else if constexpr (std::is_same_v<T, half>) {
    return detail::half_to_float(p->bits);
  } else {
    return *p;
  }
}

template <class T, class V>
EFFC_INLINE void store(T* p, V v) {
  if constexpr (std::is_same_v<T, bf16>) {
    p->bits = detail::float_to_bf16(static_cast<float>(v));
  } else if constexpr (std::is_same_v<T, half>) {
    p->bits = detail::float_to_half(static_cast<float>(v));
  } else {
    *p = cast<T>(v);
  }
}

// The value `x` has after a trip through memory of type T: rounding between ops, as eager torch does.
template <class T>
EFFC_INLINE float round_to(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return detail::bf16_to_float(detail::float_to_bf16(x));
  } else if constexpr (std::is_same_v<T, half>) {
    return detail::half_to_float(detail::float_to_half(x));
  } else {
    return cast<float>(cast<T>(x));
  }
}

}  // namespace effc
