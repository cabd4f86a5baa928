// Element-wise mathematics in float, without a branch, a call or a table, so that g++ vectorises an
// `omp simd` loop over it at any width. effc_libm.h has the same names for double.
//
// Largest error against the double result, with FMA or without (test_runtime_header.py checks it):
//   exp 1.2 ulp    exp2 1.2 ulp    expm1 1.6 ulp
//   log 1.0 ulp    log1p 1.0 ulp   log2 2.2 ulp    log10 2.1 ulp
//   tanh 2.6 ulp   erf 1.4 ulp     sin 1.7 ulp     cos 1.7 ulp
//   sigmoid 2.6 ulp, but below 1.2e-38 (x < -87) the result may be 0
// NaN gives NaN, infinities and signed zeros give what torch gives.
//
// The coefficients are minimax fits made for this file (Remez, weighted for relative error).
#pragma once

namespace effc {
namespace detail {

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr float kLog2e = 1.44269504089f;
// ln 2 in two parts: n * kLn2Hi is exact for the |n| < 2^15 that occur, with or without FMA.
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.12194440e-4f;
// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. Unlike a
// conversion to int it is defined for NaN and costs one addition.
constexpr float kRound = 12582912.0f;

// The same with the exponent's bias in it: what stands in the low bits is an exponent's bits.
constexpr float kRoundBiased = kRound + 127.0f;

// A constant that the optimiser does not know. `b > x ? b : x` is one instruction, but not with a b
// that g++ 12 sees: it then makes a comparison and a selection, and of two of them branches, into
// which it copies what follows. Nothing writes `minus_zero`; adding it changes no number.
__attribute__((used)) static float minus_zero = -0.0f;
EFFC_INLINE float opaque(float c) { return c + minus_zero; }
EFFC_INLINE double opaque(double c) { return c + minus_zero; }

// A NaN in x passes; the bound is none.
template <class T>
EFFC_INLINE T at_least(T bound, T x) {
  bound = opaque(bound);
  return bound > x ? bound : x;
}

template <class T>
EFFC_INLINE T at_most(T bound, T x) {
  bound = opaque(bound);
  return bound < x ? bound : x;
}

// 2^n for -127 <= n <= 128; the ends give 0 and infinity.
EFFC_INLINE float pow2i(int32_t n) {
  return bit_cast<float>(static_cast<uint32_t>(n + 127) << 23);
}

// The same of the n in x = n + kRoundBiased.
EFFC_INLINE float pow2_biased(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) << 23); }

struct Reduced {
  int32_t n;
  float r;
};

// x = n ln2 + r, |r| <= ln2 / 2
EFFC_INLINE Reduced reduce_ln2(float x) {
  const float t = x * kLog2e + kRound;
  const float n = t - kRound;
  const int32_t i = bit_cast<int32_t>(t) - bit_cast<int32_t>(kRound);
  return {i, (x - n * kLn2Hi) - n * kLn2Lo};
}

// e^r for |r| <= ln2 / 2; minimax, 2^-27
EFFC_INLINE float exp_poly(float r) {
  float q = 1.39414822e-3f;
  q = q * r + 8.36696941e-3f;
  q = q * r + 4.16663960e-2f;
  q = q * r + 1.66665405e-1f;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  return q * r + 1.0f;
}

// e^r - 1 for |r| <= ln2 / 2, relative 2^-31
EFFC_INLINE float expm1_poly(float r) {
  float q = 1.99108792e-4f;
  q = q * r + 1.39341177e-3f;
  q = q * r + 8.33328068e-3f;
  q = q * r + 4.16664742e-2f;
  q = q * r + 1.66666672e-1f;
  q = q * r + 0.5f;
  return (q * r) * r + r;
}

EFFC_INLINE float clamp(float x, float lo, float hi) { return at_most(hi, at_least(lo, x)); }

// e^-x where a result below FLT_MIN, or above e^88.37, may as well be 0, or infinity.
EFFC_INLINE float exp_minus(float x) {
  x = clamp(x, -88.8f, 88.0f);
  const float t = kRoundBiased - x * kLog2e;
  const float n = t - kRoundBiased;
  return exp_poly((-n * kLn2Hi - x) - n * kLn2Lo) * pow2_biased(t);
}

EFFC_INLINE double exp_minus(double x) { return ::exp(-x); }

// ln of a positive number: z = 2^e (1 + f), f in [-1/3, 1/3]
struct LogParts {
  float e, f, tail;  // tail = ln(1 + f) - f
};

EFFC_INLINE LogParts log_parts(float x) {
  const bool denormal = x < FLT_MIN;
  const int32_t u = bit_cast<int32_t>(denormal ? x * 8388608.0f : x);
  const int32_t k = (u - 0x3f2aaaab) >> 23;  // 0x3f2aaaab is 2/3
  const float e = static_cast<float>(k) - (denormal ? 23.0f : 0.0f);
  const float f =
      bit_cast<float>(static_cast<uint32_t>(u) - (static_cast<uint32_t>(k) << 23)) - 1.0f;
  float p = -1.31801829e-1f;
  p = p * f + 1.39460459e-1f;
  p = p * f + -1.21181682e-1f;
  p = p * f + 1.40146226e-1f;
  p = p * f + -1.66852057e-1f;
  p = p * f + 2.00097859e-1f;
  p = p * f + -2.49996960e-1f;
  p = p * f + 3.33332300e-1f;
  p = p * f + -0.5f;
  return {e, f, (p * f) * f};
}

EFFC_INLINE float log_special(float x, float y) {
  y = x < kInf ? y : x;  // infinity and NaN
  y = x == 0.0f ? -kInf : y;
  return x < 0.0f ? kNan : y;
}

}  // namespace detail

EFFC_INLINE float exp(float x) {
  const detail::Reduced d = detail::reduce_ln2(detail::clamp(x, -104.0f, 89.0f));
  // In two steps, so that denormal results and those next to overflow are right.
  const int32_t half_n = d.n >> 1;
  return detail::exp_poly(d.r) * detail::pow2i(half_n) * detail::pow2i(d.n - half_n);
}

EFFC_INLINE float exp2(float x) {
  x = detail::clamp(x, -151.0f, 129.0f);
  const float t = x + detail::kRound;
  const int32_t n = bit_cast<int32_t>(t) - bit_cast<int32_t>(detail::kRound);
  const float r = (x - (t - detail::kRound)) * 0.693147181f;
  const int32_t half_n = n >> 1;
  return detail::exp_poly(r) * detail::pow2i(half_n) * detail::pow2i(n - half_n);
}

EFFC_INLINE float expm1(float x) {
  const detail::Reduced d = detail::reduce_ln2(detail::clamp(x, -17.5f, 89.0f));
  // e^x - 1 = 2 (h p + (h - 1/2)), h = 2^(n-1), which is finite where 2^n is not.
  const float h = detail::pow2i(d.n - 1);
  const float y = 2.0f * (h * detail::expm1_poly(d.r) + (h - 0.5f));
  return ::fabsf(x) < 2.98e-8f ? x : y;
}

EFFC_INLINE float log(float x) {
  const detail::LogParts d = detail::log_parts(x);
  const float y = (d.e * detail::kLn2Lo + d.tail) + d.f + d.e * detail::kLn2Hi;
  return detail::log_special(x, y);
}

EFFC_INLINE float log2(float x) {
  const detail::LogParts d = detail::log_parts(x);
  // log2(e) in two parts
  const float y = d.f * 1.44269502f + (d.tail * 1.44269502f + d.f * 1.92596303e-8f) + d.e;
  return detail::log_special(x, y);
}

EFFC_INLINE float log10(float x) {
  const detail::LogParts d = detail::log_parts(x);
  // log10(e) and log10(2) in two parts each; e * 0.30078125 is exact
  const float low = d.f * -1.01030503e-8f + d.e * 2.48745664e-4f;
  const float y = d.f * 0.434294492f + (d.tail * 0.434294492f + low) + d.e * 0.30078125f;
  return detail::log_special(x, y);
}

EFFC_INLINE float log1p(float x) {
  const float u = 1.0f + x;
  const float v = u - 1.0f;
  const float lost = (1.0f - (u - v)) + (x - v);  // 1 + x = u + lost exactly (two-sum)
  const detail::LogParts d = detail::log_parts(u);
  const float fix = lost / u;
  const float y = (d.e * detail::kLn2Lo + d.tail + fix) + d.f + d.e * detail::kLn2Hi;
  return ::fabsf(x) < 2.98e-8f ? x : detail::log_special(u, y);
}

EFFC_INLINE float tanh(float x) {
  const float a = detail::at_most(10.0f, ::fabsf(x));
  // -2a = n ln2 + 2r, |r| <= ln2 / 4
  const float t = detail::kRoundBiased - a * (2.0f * detail::kLog2e);
  const float n = t - detail::kRoundBiased;
  const float r = (-n * (0.5f * detail::kLn2Hi) - a) - n * (0.5f * detail::kLn2Lo);
  const float u = r * r;
  float q = 8.88481438e-2f * r + 2.67728448e-1f;  // (e^(2r) - 1) / r, relative 2^-26
  q = q * u + (6.66675210e-1f * r + 1.33332348e0f);
  q = q * r + 1.99999988e0f;
  q = q * r + 2.0f;
  const float s = detail::pow2_biased(t);
  const float rest = (1.0f - s) - (s * r) * q;  // 1 - e^(-2a)
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  return bit_cast<float>(bit_cast<uint32_t>(rest / (2.0f - rest)) | sign);
}

EFFC_INLINE float sigmoid(float x) { return 1.0f / (1.0f + detail::exp_minus(x)); }

EFFC_INLINE float erf(float x) {
  const float a = ::fabsf(x);
  const float s = x * x;
  float p = 8.31677535e-5f;
  p = p * s + -8.13001243e-4f;
  p = p * s + 5.19990688e-3f;
  p = p * s + -2.68589407e-2f;
  p = p * s + 1.12836875e-1f;
  p = p * s + -3.76126319e-1f;
  p = p * s + 1.28379166e-1f;
  const float near = p * x + x;
  const float t = detail::at_most(4.0f, a);
  float q = 2.13961772e-4f;
  q = q * t + -3.21476418e-3f;
  q = q * t + 2.28893496e-2f;
  q = q * t + -1.05260879e-1f;
  q = q * t + -6.35719061e-1f;
  q = q * t + -1.12851417e0f;
  const detail::Reduced d = detail::reduce_ln2(q * t);
  const float far = ::copysignf(1.0f - detail::exp_poly(d.r) * detail::pow2i(d.n), x);
  return a < 0.93f ? near : far;
}

namespace detail {

// x/2 (1 + erf(x / sqrt 2)) as max(x, 0) - |x| P(-|x|), P the normal distribution's integral. log2 of
// P is nearly a parabola; the fit's error is 2^-24 of P at 0, grows as P falls, and is 2^-12 where P
// is 2^-22. At -11 the fit comes to 2^-127, which is taken for 0. Polynomials are in pairs of terms:
// with one term after the other a loop would wait for them.
EFFC_INLINE float gelu(float x) {
  const float size = ::fabsf(x), a = at_most(11.0f, size), s = a * a;
  float q = -1.24317064e-6f * a + 2.08684027e-5f;
  q = q * s + (-1.03020391e-4f * a + -3.21628090e-4f);
  q = q * s + (7.27822958e-3f * a + -5.26232938e-2f);
  q = q * s + (-4.59174335e-1f * a + -1.15110815e0f);
  const float z = q * a - 1.0f;
  const float t = z + kRoundBiased;
  const float r = z - (t - kRoundBiased), u = r * r;
  float p = 1.32647273e-3f * r + 9.67151299e-3f;  // 2^r, 2^-23
  p = p * u + (5.55073358e-2f * r + 2.40222424e-1f);
  p = p * u + (6.93147004e-1f * r + 1.0f);
  const float positive = 0.5f * x + 0.5f * size;  // max(x, 0), but NaN for -infinity as in torch
  return positive - (a * pow2_biased(t)) * p;
}

// p mod 4 in [-2, 2], exact
EFFC_INLINE double mod4(double p) { return p - 4.0 * __builtin_rint(0.25 * p); }

// x = (4 k + n) pi/2 + r, |r| <= pi/4, for every float x. 2/pi is cut into pieces of 29 bits: a
// piece times the 24 bits of x is exact in double, so whole turns can be dropped piece by piece
// without loss. Six multiplications cost less than the table look-up of Payne and Hanek, which
// needs a gather.
EFFC_INLINE Reduced reduce_pio2(float x) {
  const double d = x;
  double a = d * 0x1.5993c439041fep-148;  // the last piece is full: its product is always small
  a += mod4(d * 0x1.b81b6c5p-117);
  a += mod4(d * 0x1.d1f534dp-88);
  a += mod4(d * 0x1.4fe13abp-59);
  a += mod4(d * 0x1.9391054p-30);
  a += mod4(d * 0x1.45f306dp-1);
  const double n = __builtin_rint(a);
  const float r = static_cast<float>((a - n) * 1.5707963267948966);
  return {bit_cast<int32_t>(static_cast<float>(n) + kRound), r};
}

// sin(n pi/2 + r); only the last two bits of n count
EFFC_INLINE float sin_quarter(int32_t n, float r) {
  const float s = r * r;
  float p = -1.95175278e-4f;
  p = p * s + 8.33218079e-3f;
  p = p * s + -1.66666552e-1f;
  const float sine = (p * s) * r + r;
  float q = 2.44394105e-5f;
  q = q * s + -1.38873770e-3f;
  q = q * s + 4.16666456e-2f;
  const float cosine = (q * s) * s + (1.0f - 0.5f * s);
  const uint32_t y = bit_cast<uint32_t>(n & 1 ? cosine : sine);
  return bit_cast<float>(y ^ (static_cast<uint32_t>(n & 2) << 30));
}

}  // namespace detail

EFFC_INLINE float sin(float x) {
  const detail::Reduced d = detail::reduce_pio2(x);
  return ::fabsf(x) < 1e-4f ? x : detail::sin_quarter(d.n, d.r);
}

EFFC_INLINE float cos(float x) {
  const detail::Reduced d = detail::reduce_pio2(x);
  return detail::sin_quarter(d.n + 1, d.r);
}

}  // namespace effc
