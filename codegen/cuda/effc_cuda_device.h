// What effc_cuda.h stands on when a GPU compiler reads it: the types and ops of the C++ kernels (the
// same headers) over CUDA's mathematics. NVRTC has no standard headers, so the
// few things that ours take from them are here.
#pragma once

#if defined(__CUDACC_RTC__)

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

namespace std {

template <class A, class B> inline constexpr bool is_same_v = false;
template <class A> inline constexpr bool is_same_v<A, A> = true;
template <class T> inline constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, double>;
template <class T> inline constexpr bool is_integral_v = false;
#define EFFC_INTEGRAL(T) template <> inline constexpr bool is_integral_v<T> = true;
EFFC_INTEGRAL(bool) EFFC_INTEGRAL(int8_t) EFFC_INTEGRAL(uint8_t) EFFC_INTEGRAL(int16_t)
EFFC_INTEGRAL(uint16_t) EFFC_INTEGRAL(int32_t) EFFC_INTEGRAL(uint32_t) EFFC_INTEGRAL(int64_t)
EFFC_INTEGRAL(uint64_t)
#undef EFFC_INTEGRAL
template <class T> inline constexpr bool is_signed_v = (is_integral_v<T> || is_floating_point_v<T>) && T(-1) < T(0);
template <class T> inline constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <bool, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;

template <class T>
struct numeric_limits {  // of integers
  __device__ static constexpr T lowest() { return is_signed_v<T> ? T(T(1) << (8 * sizeof(T) - 1)) : T(0); }
  __device__ static constexpr T min() { return lowest(); }
  __device__ static constexpr T max() { return T(~lowest()); }
};
template <>
struct numeric_limits<float> {
  __device__ static float infinity() { return __int_as_float(0x7f800000); }
  __device__ static float quiet_NaN() { return __int_as_float(0x7fc00000); }
  __device__ static constexpr float max() { return 3.40282346638528859812e38f; }
  __device__ static constexpr float lowest() { return -max(); }
};
template <>
struct numeric_limits<double> {
  __device__ static double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
  __device__ static double quiet_NaN() { return __longlong_as_double(0x7ff8000000000000ll); }
  __device__ static constexpr double max() { return 1.7976931348623158e308; }
  __device__ static constexpr double lowest() { return -max(); }
};

}  // namespace std

// Whether the optimiser knows a value: effc_ops.h asks only for the sake of g++.
#define __builtin_constant_p(x) false

#else
#include <stdint.h>

#include <limits>
#include <type_traits>
#endif

#define EFFC_INLINE static __device__ __forceinline__
#define EFFC_MEMBER __device__ __forceinline__
#define EFFC_RESTRICT __restrict__

namespace effc {

namespace detail {

EFFC_INLINE uint16_t float_to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

EFFC_INLINE float bf16_to_float(uint16_t b) {
  return __uint_as_float(static_cast<uint32_t>(b) << 16);
}

EFFC_INLINE float half_to_float(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

EFFC_INLINE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// A NaN in x passes; the bound is none.
template <class T>
EFFC_INLINE T at_least(T bound, T x) { return bound > x ? bound : x; }
template <class T>
EFFC_INLINE T at_most(T bound, T x) { return bound < x ? bound : x; }

// What effc_activations.h takes from the mathematics of a target.
EFFC_INLINE float exp_minus(float x) { return ::expf(-x); }
EFFC_INLINE double exp_minus(double x) { return ::exp(-x); }
EFFC_INLINE float gelu(float x) { return x * ::normcdff(x); }

}  // namespace detail

#define EFFC_UNARY(name)                                   \
  EFFC_INLINE float name(float x) { return ::name##f(x); } \
  EFFC_INLINE double name(double x) { return ::name(x); }

EFFC_UNARY(acos) EFFC_UNARY(acosh) EFFC_UNARY(asin) EFFC_UNARY(asinh) EFFC_UNARY(atan)
EFFC_UNARY(atanh) EFFC_UNARY(ceil) EFFC_UNARY(cos) EFFC_UNARY(cosh) EFFC_UNARY(erf)
EFFC_UNARY(erfc) EFFC_UNARY(exp) EFFC_UNARY(exp2) EFFC_UNARY(expm1) EFFC_UNARY(floor)
EFFC_UNARY(log) EFFC_UNARY(log10) EFFC_UNARY(log1p) EFFC_UNARY(log2) EFFC_UNARY(sin)
EFFC_UNARY(sinh) EFFC_UNARY(sqrt) EFFC_UNARY(tan) EFFC_UNARY(tanh) EFFC_UNARY(trunc)
#undef EFFC_UNARY

// Half goes to even, as in torch.round.
EFFC_INLINE float round(float x) { return ::rintf(x); }
EFFC_INLINE double round(double x) { return ::rint(x); }

#define EFFC_BINARY(name)                                              \
  EFFC_INLINE float name(float a, float b) { return ::name##f(a, b); } \
  EFFC_INLINE double name(double a, double b) { return ::name(a, b); }

EFFC_BINARY(atan2) EFFC_BINARY(copysign) EFFC_BINARY(fmod)
#undef EFFC_BINARY

template <class T>
EFFC_INLINE T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }

}  // namespace effc

#define EFFC_CONVERSIONS  // those above
#include "effc_types.h"
#include "effc_ops.h"

// -- activations; effc_activations.h has the same for a CPU's vectors, bound to its mathematics -----

namespace effc {

template <class T>
EFFC_INLINE T relu(T x) { return maximum(x, T(0)); }

template <class T>
EFFC_INLINE T leaky_relu(T x, T slope) { return x > T(0) ? x : x * slope; }

template <class T>
EFFC_INLINE T hardsigmoid(T x) { return clamp(x + T(3), T(0), T(6)) / T(6); }

template <class T>
EFFC_INLINE T hardswish(T x) { return x * clamp(x + T(3), T(0), T(6)) / T(6); }

template <class T>
EFFC_INLINE T silu(T x) { return x / (T(1) + exp(-x)); }

EFFC_INLINE float gelu(float x) { return x * ::normcdff(x); }  // x P(x), P the normal distribution's
EFFC_INLINE double gelu(double x) { return x * ::normcdf(x); }

template <class T>
EFFC_INLINE T gelu_tanh(T x) {
  // 1 + tanh(u) = 2 sigmoid(2u): one exp, and no cancellation for negative x
  const T u = x * (T(1.5957691216057307) + T(0.071354816272600249) * x * x);
  return x / (T(1) + exp(-u));
}

template <class T>
EFFC_INLINE T softplus(T x, T beta = T(1), T linear_above = T(20)) {
  const T z = x * beta;
  return z > linear_above ? x : log1p(exp(z)) / beta;
}

template <class T>
EFFC_INLINE T mish(T x) { return x * tanh(softplus(x)); }

template <class T>
EFFC_INLINE T log_sigmoid(T x) { return minimum(x, T(0)) - log1p(exp(-abs(x))); }

template <class T>
EFFC_INLINE T elu(T x, T alpha = T(1), T scale = T(1), T input_scale = T(1)) {
  return x <= T(0) ? expm1(x * input_scale) * (alpha * scale) : x * scale;
}

}  // namespace effc
