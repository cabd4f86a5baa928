// What one lane computes: a struct with a static f for each operation of PTX.
#pragma once

namespace simt {

#define SIMT_F static inline __attribute__((always_inline))

template <class T>
using U = std::make_unsigned_t<T>;

// ------------------------------------------------------------------ integers and bits

template <class T> struct Mov { SIMT_F T f(T a) { return a; } };
template <class T> struct Add { SIMT_F T f(T a, T b) { return T(U<T>(a) + U<T>(b)); } };
template <class T> struct Sub { SIMT_F T f(T a, T b) { return T(U<T>(a) - U<T>(b)); } };
template <> struct Add<float> { SIMT_F float f(float a, float b) { return a + b; } };
template <> struct Add<double> { SIMT_F double f(double a, double b) { return a + b; } };
template <> struct Sub<float> { SIMT_F float f(float a, float b) { return a - b; } };
template <> struct Sub<double> { SIMT_F double f(double a, double b) { return a - b; } };
// 16-bit operands would be promoted to int, whose product may overflow.
template <class T> struct Mul { SIMT_F T f(T a, T b) { return T(uint64_t(a) * uint64_t(b)); } };
template <> struct Mul<int32_t> { SIMT_F int32_t f(int32_t a, int32_t b) { return int32_t(uint32_t(a) * uint32_t(b)); } };
template <> struct Mul<uint32_t> { SIMT_F uint32_t f(uint32_t a, uint32_t b) { return a * b; } };
template <> struct Mul<float> { SIMT_F float f(float a, float b) { return a * b; } };
template <> struct Mul<double> { SIMT_F double f(double a, double b) { return a * b; } };

template <class T> struct Wider;
template <> struct Wider<int8_t> { using type = int16_t; };
template <> struct Wider<uint8_t> { using type = uint16_t; };
template <> struct Wider<int16_t> { using type = int32_t; };
template <> struct Wider<uint16_t> { using type = uint32_t; };
template <> struct Wider<int32_t> { using type = int64_t; };
template <> struct Wider<uint32_t> { using type = uint64_t; };
template <> struct Wider<int64_t> { using type = __int128; };
template <> struct Wider<uint64_t> { using type = unsigned __int128; };
template <class T> using Wide = typename Wider<T>::type;

template <class T> struct MulWide { SIMT_F Wide<T> f(T a, T b) { return Wide<T>(a) * Wide<T>(b); } };
template <class T> struct MulHi { SIMT_F T f(T a, T b) { return T(Wide<T>(a) * Wide<T>(b) >> 8 * sizeof(T)); } };
template <class T> struct Mad { SIMT_F T f(T a, T b, T c) { return Add<T>::f(Mul<T>::f(a, b), c); } };
template <class T> struct MadWide {
  SIMT_F Wide<T> f(T a, T b, Wide<T> c) { return Add<Wide<T>>::f(Wide<T>(a) * Wide<T>(b), c); }
};
template <class T> struct MadHi { SIMT_F T f(T a, T b, T c) { return Add<T>::f(MulHi<T>::f(a, b), c); } };
template <class T> struct Clamp {  // of a wide result
  SIMT_F T f(Wide<T> v) {
    const Wide<T> lo = std::is_signed_v<T> ? Wide<T>(T(U<T>(1) << (8 * sizeof(T) - 1))) : 0;
    const Wide<T> hi = std::is_signed_v<T> ? ~lo : Wide<T>(U<T>(~U<T>(0)));
    return T(v < lo ? lo : v > hi ? hi : v);
  }
};
template <class T> struct AddSat { SIMT_F T f(T a, T b) { return Clamp<T>::f(Wide<T>(a) + b); } };
template <class T> struct SubSat { SIMT_F T f(T a, T b) { return Clamp<T>::f(Wide<T>(a) - b); } };
template <class T> struct MadHiSat { SIMT_F T f(T a, T b, T c) { return Clamp<T>::f(Wide<T>(MulHi<T>::f(a, b)) + c); } };
template <class T> struct Mul24 { SIMT_F T f(T a, T b) { return Mul<T>::f(T(T(U<T>(a) << 8) >> 8), T(T(U<T>(b) << 8) >> 8)); } };
template <class T> struct Mad24 { SIMT_F T f(T a, T b, T c) { return Add<T>::f(Mul24<T>::f(a, b), c); } };
template <class T> struct Sad { SIMT_F T f(T a, T b, T c) { return T(U<T>(c) + (a > b ? U<T>(a) - U<T>(b) : U<T>(b) - U<T>(a))); } };
// Division by zero is unspecified by PTX; all ones, as GPUs give. The most negative by -1 wraps.
template <class T> struct Div {
  SIMT_F T f(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return Sub<T>::f(0, a);
    return T(a / b);
  }
};
template <> struct Div<float> { SIMT_F float f(float a, float b) { return a / b; } };
template <> struct Div<double> { SIMT_F double f(double a, double b) { return a / b; } };
template <class T> struct Rem {
  SIMT_F T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
template <class T> struct And { SIMT_F T f(T a, T b) { return a & b; } };
template <class T> struct Or { SIMT_F T f(T a, T b) { return a | b; } };
template <class T> struct Xor { SIMT_F T f(T a, T b) { return a ^ b; } };
template <class T> struct Not { SIMT_F T f(T a) { return T(~a); } };
template <class T> struct Cnot { SIMT_F T f(T a) { return a == 0; } };
template <class T> struct Shl { SIMT_F T f(T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(U<T>(a) << (n & (8 * sizeof(T) - 1))); } };
template <class T> struct Shr {
  SIMT_F T f(T a, uint32_t n) {
    constexpr uint32_t top = 8 * sizeof(T) - 1;
    return std::is_signed_v<T> ? T(a >> (n > top ? top : n)) : n > top ? T(0) : T(a >> (n & top));
  }
};
template <class T> struct Min { SIMT_F T f(T a, T b) { return a < b ? a : b; } };
template <class T> struct Max { SIMT_F T f(T a, T b) { return a > b ? a : b; } };
// Of a number and a NaN, the number; -0 is less than +0.
template <class F> struct MinF {
  SIMT_F F f(F a, F b) {
    using B = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;
    const F zero = bits<F>(B(bits<B>(a) | bits<B>(b)));
    const F least = a < b ? a : b < a ? b : zero;
    return a != a ? b : b != b ? a : least;
  }
};
template <class F> struct MaxF {
  SIMT_F F f(F a, F b) {
    using B = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;
    const F zero = bits<F>(B(bits<B>(a) & bits<B>(b)));
    const F most = a > b ? a : b > a ? b : zero;
    return a != a ? b : b != b ? a : most;
  }
};
template <> struct Min<float> : MinF<float> {};
template <> struct Min<double> : MinF<double> {};
template <> struct Max<float> : MaxF<float> {};
template <> struct Max<double> : MaxF<double> {};
struct MinNaN { SIMT_F float f(float a, float b) { return a != a || b != b ? bits<float>(0x7fffffffu) : MinF<float>::f(a, b); } };
struct MaxNaN { SIMT_F float f(float a, float b) { return a != a || b != b ? bits<float>(0x7fffffffu) : MaxF<float>::f(a, b); } };
template <class G> struct XorSign {  // the sign of a xor b, the magnitude by G
  SIMT_F float f(float a, float b) {
    const uint32_t sign = (bits<uint32_t>(a) ^ bits<uint32_t>(b)) & 0x80000000u;
    const float v = G::f(bits<float>(bits<uint32_t>(a) & 0x7fffffffu), bits<float>(bits<uint32_t>(b) & 0x7fffffffu));
    return bits<float>((bits<uint32_t>(v) & 0x7fffffffu) | sign);
  }
};
template <class T> struct Min3 { SIMT_F T f(T a, T b, T c) { return Min<T>::f(Min<T>::f(a, b), c); } };
template <class T> struct Max3 { SIMT_F T f(T a, T b, T c) { return Max<T>::f(Max<T>::f(a, b), c); } };
template <class T, class G> struct Pairs {  // two 16-bit integers in a register
  SIMT_F uint32_t f(uint32_t a, uint32_t b) {
    return uint32_t(uint16_t(G::f(T(a), T(b)))) | uint32_t(uint16_t(G::f(T(a >> 16), T(b >> 16)))) << 16;
  }
};
template <class T> struct Neg { SIMT_F T f(T a) { return T(U<T>(0) - U<T>(a)); } };
template <> struct Neg<float> { SIMT_F float f(float a) { return -a; } };
template <> struct Neg<double> { SIMT_F double f(double a) { return -a; } };
template <class T> struct Abs { SIMT_F T f(T a) { return a < 0 ? Neg<T>::f(a) : a; } };
template <> struct Abs<float> { SIMT_F float f(float a) { return std::fabs(a); } };
template <> struct Abs<double> { SIMT_F double f(double a) { return std::fabs(a); } };
template <class T> struct Copysign {  // copysign.f d, a, b: the sign of a, the magnitude of b
  SIMT_F T f(T a, T b) { return std::copysign(b, a); }
};
template <class T> struct Popc { SIMT_F uint32_t f(T a) { return uint32_t(sizeof(T) == 8 ? __builtin_popcountll(a) : __builtin_popcount(a)); } };
template <class T> struct Clz { SIMT_F uint32_t f(T a) { return a == 0 ? 8 * sizeof(T) : sizeof(T) == 8 ? __builtin_clzll(a) : __builtin_clz(uint32_t(a)); } };
template <class T> struct Brev {
  SIMT_F T f(T a) {
    T r = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); i++) r |= T(a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return r;
  }
};
template <class T, bool SHIFT> struct Bfind {
  SIMT_F uint32_t f(T a) {
    const U<T> v = std::is_signed_v<T> && a < 0 ? U<T>(~a) : U<T>(a);
    if (v == 0) return ~0u;
    const uint32_t top = 8 * sizeof(T) - 1 - Clz<U<T>>::f(v);
    return SHIFT ? 8 * sizeof(T) - 1 - top : top;
  }
};
struct Fns {
  SIMT_F uint32_t f(uint32_t mask, uint32_t base, int32_t offset) {
    const int step = offset < 0 ? -1 : 1;
    int left = offset == 0 ? 0 : (offset < 0 ? -offset : offset) - 1;
    for (int i = int(base & 31); i >= 0 && i < 32; i += step) {
      if (mask >> i & 1) {
        if (left == 0) return uint32_t(i);
        left--;
      }
      if (offset == 0) break;
    }
    return ~0u;
  }
};
template <class T> struct Bfe {
  SIMT_F T f(T a, uint32_t pos, uint32_t len) {
    constexpr uint32_t W = 8 * sizeof(T);
    pos &= 255, len &= 255;
    if (len == 0) return 0;
    if (std::is_signed_v<T>) {
      const uint32_t last = pos + len - 1 < W - 1 ? pos + len - 1 : W - 1;
      const T sign = U<T>(a) >> last & 1 ? T(-1) : T(0);
      if (pos >= W) return sign;
      const U<T> v = U<T>(a) >> pos;
      if (len >= W || pos + len > W) return len >= W - pos ? T(W - pos >= W ? v : (v | (U<T>(sign) << (W - pos)))) : T(v);
      return T((v & ((U<T>(1) << len) - 1)) | (len < W ? U<T>(sign) << len : 0));
    }
    if (pos >= W) return 0;
    const U<T> v = U<T>(a) >> pos;
    return T(len >= W ? v : v & ((U<T>(1) << len) - 1));
  }
};
template <class T> struct Bfi {  // a into b
  SIMT_F T f(T a, T b, uint32_t pos, uint32_t len) {
    constexpr uint32_t W = 8 * sizeof(T);
    pos &= 255, len &= 255;
    if (len == 0 || pos >= W) return b;
    const T field = len >= W ? T(~T(0)) : T((T(1) << len) - 1);
    return T((b & ~T(field << pos)) | T(T(a & field) << pos));
  }
};
template <bool WRAP> struct Bmsk {
  SIMT_F uint32_t f(uint32_t pos, uint32_t len) {
    if (WRAP) pos &= 31, len &= 31;
    if (pos >= 32 || len == 0) return 0;
    return (len >= 32 ? ~0u : (1u << len) - 1) << pos;
  }
};
template <class T, bool WRAP> struct Szext {
  SIMT_F T f(T a, uint32_t n) {
    if (WRAP) n &= 31;
    if (n >= 32) return a;
    if (n == 0) return 0;
    const uint32_t v = uint32_t(a) << (32 - n);
    return std::is_signed_v<T> ? T(int32_t(v) >> (32 - n)) : T(v >> (32 - n));
  }
};
template <int LUT> struct Lop3 {
  SIMT_F uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
    if (LUT & 1) r |= ~a & ~b & ~c;
    if (LUT & 2) r |= ~a & ~b & c;
    if (LUT & 4) r |= ~a & b & ~c;
    if (LUT & 8) r |= ~a & b & c;
    if (LUT & 16) r |= a & ~b & ~c;
    if (LUT & 32) r |= a & ~b & c;
    if (LUT & 64) r |= a & b & ~c;
    if (LUT & 128) r |= a & b & c;
    return r;
  }
};
template <bool LEFT, bool WRAP> struct Shf {
  SIMT_F uint32_t f(uint32_t lo, uint32_t hi, uint32_t n) {
    n = WRAP ? n & 31 : n < 32 ? n : 32;
    const uint64_t v = uint64_t(hi) << 32 | lo;
    return uint32_t(LEFT ? v << n >> 32 : v >> n);
  }
};
enum PrmtMode { BYTES, F4E, B4E, RC8, ECL, ECR, RC16 };
template <int MODE> struct Prmt {
  SIMT_F uint32_t f(uint32_t a, uint32_t b, uint32_t s) {
    const uint64_t v = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (uint32_t i = 0; i < 4; i++) {
      uint32_t k = s & 3, sign = 0;
      if (MODE == BYTES) k = s >> 4 * i & 7, sign = s >> (4 * i + 3) & 1;
      else if (MODE == F4E) k = k + i;
      else if (MODE == B4E) k = (k - i) & 7;
      else if (MODE == ECL) k = k > i ? k : i;
      else if (MODE == ECR) k = k < i ? k : i;
      else if (MODE == RC16) k = (k & 1) * 2 + (i & 1);
      uint32_t byte = uint32_t(v >> 8 * k) & 255;
      if (sign) byte = byte & 128 ? 255 : 0;
      r |= byte << 8 * i;
    }
    return r;
  }
};
template <class A, class B> struct Dp4a {
  SIMT_F uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; i++) c += uint32_t(int32_t(A(a >> 8 * i)) * int32_t(B(b >> 8 * i)));
    return c;
  }
};
template <class A, class B, bool HIGH> struct Dp2a {  // A: int16_t or uint16_t, B: 8 bits
  SIMT_F uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 2; i++)
      c += uint32_t(int32_t(A(a >> 16 * i)) * int32_t(B(b >> 8 * (i + (HIGH ? 2 : 0)))));
    return c;
  }
};
// With carries: f(carry, operands...) changes the carry.
template <class T> struct AddC { SIMT_F T f(bool& c, T a, T b) { const Wide<T> s = Wide<T>(a) + b + c; c = bool(s >> 8 * sizeof(T)); return T(s); } };
template <class T> struct SubC {  // the carry is the borrow
  SIMT_F T f(bool& c, T a, T b) { const Wide<T> s = Wide<T>(a) - b - c; c = bool(s >> 8 * sizeof(T) & 1); return T(s); }
};
template <class T> struct MadLoC { SIMT_F T f(bool& c, T a, T b, T d) { return AddC<T>::f(c, T(Wide<T>(a) * b), d); } };
template <class S> struct MadHiC { SIMT_F U<S> f(bool& c, U<S> a, U<S> b, U<S> d) { return AddC<U<S>>::f(c, U<S>(MulHi<S>::f(S(a), S(b))), d); } };
template <class G> struct Carry0 {  // .cc without a carry in
  template <class... A> SIMT_F auto f(bool& c, A... a) { c = false; return G::f(c, a...); }
};

// ------------------------------------------------------------------ comparisons

#define SIMT_COMPARE(NAME, OP) \
  template <class T> struct NAME { SIMT_F bool f(T a, T b) { return a OP b; } };
SIMT_COMPARE(Eq, ==)
SIMT_COMPARE(Ne, !=)
SIMT_COMPARE(Lt, <)
SIMT_COMPARE(Le, <=)
SIMT_COMPARE(Gt, >)
SIMT_COMPARE(Ge, >=)
#undef SIMT_COMPARE
template <class T> struct NeOrdered { SIMT_F bool f(T a, T b) { return a < b || a > b; } };
template <class T> struct Num { SIMT_F bool f(T a, T b) { return a == a && b == b; } };
template <class T> struct IsNan { SIMT_F bool f(T a, T b) { return a != a || b != b; } };
template <class G> struct Unordered {
  template <class T> SIMT_F bool f(T a, T b) { return a != a || b != b || G::f(a, b); }
};
enum Test { FINITE, INFINITE, NUMBER, NOTANUMBER, NORMAL, SUBNORMAL };
template <class T, int KIND> struct Testp {
  SIMT_F bool f(T a) {
    const T m = std::fabs(a), least = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
    const bool finite = m - m == 0;
    return KIND == FINITE ? finite : KIND == INFINITE ? a == a && !finite : KIND == NUMBER ? a == a
         : KIND == NOTANUMBER ? a != a : KIND == NORMAL ? finite && m >= least : m != 0 && m < least;
  }
};
template <class T, class C> struct Slct { SIMT_F T f(T a, T b, C c) { return c >= 0 ? a : b; } };
template <class D, class G> struct Set {  // all ones, or 1.0
  template <class T> SIMT_F D f(T a, T b) {
    const bool p = G::f(a, b);
    return std::is_floating_point_v<D> ? D(p) : p ? D(-1) : D(0);
  }
};

// ------------------------------------------------------------------ floats

SIMT_F float flush(float a) {
  const uint32_t u = bits<uint32_t>(a);
  return (u & 0x7f800000u) ? a : bits<float>(u & 0x80000000u);
}
SIMT_F double flush(double a) { return a; }
// .ftz: subnormal operands and results become zeros of their sign.
template <class G> struct Ftz {
  template <class... T> SIMT_F auto f(T... a) {
    if constexpr (std::is_same_v<decltype(G::f(a...)), bool>) return G::f(flush(a)...);
    else return flush(G::f(flush(a)...));
  }
};
template <class G> struct Sat {
  template <class... T> SIMT_F auto f(T... a) {
    const auto v = G::f(a...);
    return v > 0 ? (v < 1 ? v : decltype(v)(1)) : decltype(v)(0);
  }
};
template <class G> struct ReluOf {  // .relu: negatives and NaN's sign go
  template <class... T> SIMT_F auto f(T... a) {
    const auto v = G::f(a...);
    return v < 0 ? decltype(v)(0) : v;
  }
};
template <class T> struct Fma { SIMT_F T f(T a, T b, T c) { return std::fma(a, b, c); } };
// For 16-bit results: rounded to odd, so that rounding again is rounding once
// (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
struct FmaOdd {
  SIMT_F float f(float a, float b, float c) {
    const float p = a * b, s = p + c, t = s - p, e = (p - (s - t)) + (c - t);
    const uint32_t u = bits<uint32_t>(s);
    const bool away = (e > 0) == (s > 0), fix = e != 0 && !(u & 1) && s - s == 0;
    return bits<float>(fix ? (away ? u + 1 : u - 1) : u);
  }
};
template <class T> struct Rcp { SIMT_F T f(T a) { return T(1) / a; } };
template <class T> struct Sqrt { SIMT_F T f(T a) { return std::sqrt(a); } };
template <class T> struct Rsqrt { SIMT_F T f(T a) { return T(1) / std::sqrt(a); } };

struct Ex2 {  // 2^x to an ulp or two, subnormal results included
  SIMT_F float f(float x) {
    const float c = x > 129.0f ? 129.0f : x < -151.0f ? -151.0f : x;
    const float n = __builtin_rintf(c), r = (c - n) * 0.69314718f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t k = int32_t(x == x ? n : 0.0f), half = k >> 1, rest = k - half;
    const float v = p * bits<float>(uint32_t(half + 127) << 23) * bits<float>(uint32_t(rest + 127) << 23);
    return x == x ? v : x;
  }
};
struct Lg2 {
  SIMT_F float f(float x) {
    const bool tiny = x < 0x1p-126f;
    const uint32_t u = bits<uint32_t>(tiny ? x * 0x1p24f : x), shifted = u - 0x3f3504f3u;
    const float e = float(int32_t(shifted) >> 23) - (tiny ? 24.0f : 0.0f);
    const float m = bits<float>((shifted & 0x7fffffu) + 0x3f3504f3u), s = (m - 1) / (m + 1), q = s * s;
    const float t = 1 + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9))));
    const float v = e + 2.8853900817779268f * s * t;
    const float inf = bits<float>(0x7f800000u);
    return x == 0 ? -inf : x < 0 || x != x ? bits<float>(0x7fffffffu) : x == inf ? inf : v;
  }
};
struct Sin { SIMT_F float f(float a) { return std::sin(a); } };
struct Cos { SIMT_F float f(float a) { return std::cos(a); } };
struct Tanh { SIMT_F float f(float a) { return std::tanh(a); } };

// ------------------------------------------------------------------ conversions

enum Round { RN, RZ, RM, RP, RNA };

// The integer nearest v by the mode. Only for magnitudes below 2^52.
SIMT_F double integral(double v, int mode) {
  return mode == RZ ? std::trunc(v) : mode == RM ? std::floor(v) : mode == RP ? std::ceil(v) : std::nearbyint(v);
}
// v in a format of P significant bits, least exponent EMIN and largest value `most`: its scaled value
// as a double, rounded once.
SIMT_F double round_to(double v, int P, int emin, int mode) {
  if (v == 0 || v - v != 0) return v;
  int e;
  std::frexp(v, &e);  // v = f * 2^e, f in [0.5, 1)
  e = e - 1 < emin ? emin : e - 1;
  const int shift = P - 1 - e;
  const double scaled = std::ldexp(v, shift);
  double r;
  if (mode == RNA) r = std::copysign(std::floor(std::fabs(scaled) + 0.5), v);
  else r = integral(scaled, mode);
  return std::ldexp(r, -shift);
}
// Larger than every value: infinity, or the largest value where the mode rounds towards it.
SIMT_F double overflow(double r, double most, int mode) {
  if (!(std::fabs(r) > most) || r - r != 0) return r;
  const bool keep = mode == RZ || (mode == RM && r > 0) || (mode == RP && r < 0);
  return std::copysign(keep ? most : double(INFINITY), r);
}
SIMT_F uint16_t to_half(double v, int mode) {
  return float_to_half(float(overflow(round_to(v, 11, -14, mode), 65504.0, mode)));
}
SIMT_F uint16_t to_bf16(double v, int mode) {
  const float f = float(overflow(round_to(v, 8, -126, mode), 0x1.fep127, mode));
  return float_to_bf16(f);
}
SIMT_F float to_float(double v, int mode) {
  return float(overflow(round_to(v, 24, -126, mode), 0x1.fffffep127, mode));
}
// tf32 keeps the register's 32 bits; the low 13 are zero.
SIMT_F float to_tf32(float v, int mode) { return v - v != 0 ? v : float(overflow(round_to(v, 11, -126, mode), 0x1.ffcp127, mode)); }
// e4m3 has no infinity: 448 is the largest, 0x7f NaN. Both saturate (.satfinite).
SIMT_F uint8_t to_e4m3(double v) {
  if (v != v) return 0x7f;
  const double r = round_to(v, 4, -6, RN), a = std::fabs(r) > 448 ? 448 : std::fabs(r);
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  if (a == 0) return sign;
  int e;
  const double f = std::frexp(a, &e) * 2;
  e -= 1;
  if (e < -6) return uint8_t(sign | uint8_t(std::ldexp(a, 9)));
  return uint8_t(sign | (e + 7) << 3 | uint8_t((f - 1) * 8));
}
SIMT_F uint8_t to_e5m2(double v) {
  if (v != v) return 0x7f;
  const double r = round_to(v, 3, -14, RN), a = std::fabs(r) > 57344 ? 57344 : std::fabs(r);
  return uint8_t(float_to_half(float(std::copysign(a, v))) >> 8);
}
SIMT_F float from_e4m3(uint8_t b) {
  const float sign = b & 0x80 ? -1.0f : 1.0f;
  const int e = b >> 3 & 15, m = b & 7;
  if (e == 15 && m == 7) return bits<float>(0x7fffffffu);
  return sign * (e ? std::ldexp(1.0f + float(m) / 8, e - 7) : std::ldexp(float(m) / 8, -6));
}
SIMT_F float from_e5m2(uint8_t b) { return half_to_float(uint16_t(b << 8)); }

// Integer, from a register that may be wider.
template <class D, class S, bool SAT> struct CvtInt {
  template <class R> SIMT_F D f(R r) {
    const S v = S(r);
    if (!SAT) return D(v);
    __int128 lo = std::is_signed_v<D> ? -((__int128)1 << (8 * sizeof(D) - 1)) : 0;
    __int128 hi = ((__int128)1 << (8 * sizeof(D) - std::is_signed_v<D>)) - 1;
    const __int128 x = v;
    return D(x < lo ? lo : x > hi ? hi : x);
  }
};
// Float to integer: always clamped to the range; NaN gives 0.
template <class D, int MODE> struct CvtFloatInt {
  template <class T> SIMT_F D f(T v) {
    const double r = integral(double(v), MODE);
    constexpr double hi = std::is_signed_v<D> ? (sizeof(D) == 8 ? 0x1p63 : sizeof(D) == 4 ? 0x1p31 : sizeof(D) == 2 ? 0x1p15 : 0x1p7)
                                              : (sizeof(D) == 8 ? 0x1p64 : sizeof(D) == 4 ? 0x1p32 : sizeof(D) == 2 ? 0x1p16 : 0x1p8);
    constexpr double lo = std::is_signed_v<D> ? -hi : 0;
    constexpr D most = std::is_signed_v<D> ? D(U<D>(~U<D>(0)) >> 1) : D(~D(0)), least = std::is_signed_v<D> ? D(~most) : D(0);
    if (v != v) return sizeof(D) == 8 ? (std::is_signed_v<D> ? least : D(U<D>(1) << 63)) : D(0);
    return r >= hi ? most : r < lo ? least : D(r);
  }
};
template <class D, class S> struct CvtIntFloat {  // nearest
  template <class R> SIMT_F D f(R r) { return D(S(r)); }
};
template <class D, class S, int MODE> struct CvtIntFloatBy {
  template <class R> SIMT_F D f(R r) {
    const S v = S(r);
    D d = D(v);  // nearest; a neighbour where the mode says so
    const __int128 back = d >= D(0x1p126) ? ((__int128)1 << 100) : (__int128)d;
    const __int128 x = v;
    if (MODE != RN && back != x) {
      const bool above = back > x, up = MODE == RP || (MODE == RZ && x < 0), down = MODE == RM || (MODE == RZ && x > 0);
      if (above && down) d = std::nextafter(d, -D(INFINITY));
      if (!above && up) d = std::nextafter(d, D(INFINITY));
    }
    return d;
  }
};
template <class H, class S, int MODE> struct CvtIntHalf {
  template <class R> SIMT_F uint16_t f(R r) {
    const S v = S(r);
    // 64-bit integers beyond 2^53 are beyond or exact enough for f16's and bf16's 11 and 8 bits,
    // once the bits below are folded into one (rounding to odd).
    const bool large = (v > S(0) ? uint64_t(v) : uint64_t(0) - uint64_t(v)) >> 53;
    const double x = large ? double(S(S(v >> 12) | S((v & S(4095)) != 0))) * 4096.0 : double(v);
    return std::is_same_v<H, f16> ? to_half(x, MODE) : to_bf16(x, MODE);
  }
};
template <class D, int MODE> struct CvtFloat {  // between f32 and f64
  template <class T> SIMT_F D f(T v) {
    if constexpr (sizeof(D) == 8 || sizeof(T) == 4 || MODE == RN) return D(v);
    else return v - v != 0 ? D(v) : to_float(v, MODE);
  }
};
template <int MODE> struct CvtIntegral { template <class T> SIMT_F T f(T v) {
  const T r = MODE == RZ ? std::trunc(v) : MODE == RM ? std::floor(v) : MODE == RP ? std::ceil(v) : std::nearbyint(v);
  return r; } };
template <class H, int MODE> struct CvtToHalf {
  template <class T> SIMT_F uint16_t f(T v) {
    if (v - v != 0) return std::is_same_v<H, f16> ? float_to_half(float(v)) : float_to_bf16(float(v));
    return std::is_same_v<H, f16> ? to_half(double(v), MODE) : to_bf16(double(v), MODE);
  }
};
template <class H> struct FromHalf {
  template <class R> SIMT_F float f(R v) { return std::is_same_v<H, f16> ? half_to_float(uint16_t(v)) : bf16_to_float(uint16_t(v)); }
};
template <int MODE> struct CvtTf32 { SIMT_F float f(float v) { return to_tf32(v, MODE); } };
template <bool E4M3, class G> struct CvtToFp8x2 {  // {high a, low b}
  SIMT_F uint16_t f(float a, float b) {
    const float x = G::f(a), y = G::f(b);
    return uint16_t((E4M3 ? to_e4m3(x) : to_e5m2(x)) << 8 | (E4M3 ? to_e4m3(y) : to_e5m2(y)));
  }
};
template <bool E4M3> struct CvtHalfFp8x2 {
  SIMT_F uint16_t f(uint32_t v) { return CvtToFp8x2<E4M3, Mov<float>>::f(half_to_float(uint16_t(v >> 16)), half_to_float(uint16_t(v))); }
};
template <bool E4M3> struct CvtFp8Half2 {
  SIMT_F uint32_t f(uint16_t v) {
    const float a = E4M3 ? from_e4m3(uint8_t(v >> 8)) : from_e5m2(uint8_t(v >> 8)), b = E4M3 ? from_e4m3(uint8_t(v)) : from_e5m2(uint8_t(v));
    return uint32_t(float_to_half(a)) << 16 | float_to_half(b);
  }
};
template <class D, class S> struct CvtPackSat {  // two s32 to 16 or 8 bits
  SIMT_F uint32_t one(int32_t v) { return uint32_t(U<D>(CvtInt<D, S, true>::f(S(v)))); }
  SIMT_F uint32_t f(int32_t a, int32_t b) { return one(a) << 8 * sizeof(D) | one(b); }
  SIMT_F uint32_t f(int32_t a, int32_t b, uint32_t c) { return c << 16 * sizeof(D) | one(a) << 8 * sizeof(D) | one(b); }
};

// Directed rounding (.rz .rm .rp): in a format twice as wide, with the sign of what even that lost.
template <class T> struct Twice { using type = double; };
#if defined(__SIZEOF_FLOAT128__)
template <> struct Twice<double> { using type = __float128; };
#else
template <> struct Twice<double> { using type = long double; };  // 128 bits on AArch64
#endif
template <class T, int MODE> struct Directed {
  using W = typename Twice<T>::type;
  SIMT_F T pick(W w, int lost) {
    const T r = T(w);
    if (w - w != 0) return r;
    const bool above = W(r) > w || (W(r) == w && lost < 0), below = W(r) < w || (W(r) == w && lost > 0);
    if (above && (MODE == RM || (MODE == RZ && r > 0))) return std::nextafter(r, -T(INFINITY));
    if (below && (MODE == RP || (MODE == RZ && r < 0))) return std::nextafter(r, T(INFINITY));
    return r;
  }
  SIMT_F int sign(W v) { return (v > 0) - (v < 0); }
  SIMT_F T sum(W a, W b) {
    const W s = a + b, t = s - a;
    // x - x is -0 when rounding down.
    if (s == 0 && a != 0) return MODE == RM ? T(-0.0) : T(0);
    return pick(s, sign((a - (s - t)) + (b - t)));
  }
};
template <class T, int MODE> struct AddBy : Directed<T, MODE> { SIMT_F T f(T a, T b) { return AddBy::sum(a, b); } };
template <class T, int MODE> struct SubBy : Directed<T, MODE> { SIMT_F T f(T a, T b) { return SubBy::sum(a, -b); } };
template <class T, int MODE> struct MulBy : Directed<T, MODE> { SIMT_F T f(T a, T b) { return MulBy::pick(typename MulBy::W(a) * b, 0); } };
template <class T, int MODE> struct FmaBy : Directed<T, MODE> { SIMT_F T f(T a, T b, T c) { return FmaBy::sum(typename FmaBy::W(a) * b, c); } };
template <class T, int MODE> struct DivBy : Directed<T, MODE> {
  SIMT_F T f(T a, T b) {
    const typename DivBy::W q = typename DivBy::W(a) / b, r = typename DivBy::W(T(q)) * b;
    return DivBy::pick(q, typename DivBy::W(T(q)) == q && q - q == 0 ? DivBy::sign(typename DivBy::W(a) - r) * DivBy::sign(b) : 0);
  }
};
template <class T, int MODE> struct RcpBy { SIMT_F T f(T a) { return DivBy<T, MODE>::f(1, a); } };
template <class T, int MODE> struct SqrtBy : Directed<T, MODE> {
  SIMT_F T f(T a) {
    using W = typename SqrtBy::W;
    const T r = std::sqrt(a);
    return SqrtBy::pick(W(r), SqrtBy::sign(W(a) - W(r) * W(r)));
  }
};

template <class R> struct Ext {  // to the register's width, by the sign of what comes
  template <class T> SIMT_F R f(T v) { return R(v); }
};
template <class F, class G> struct Then {  // F after G
  template <class... T> SIMT_F auto f(T... v) { return F::f(G::f(v...)); }
};
struct Flush {
  template <class T> SIMT_F T f(T v) { return flush(v); }
};
template <class F, class H, class D, int MODE> struct PackBy {  // {high a, low b}
  SIMT_F D f(float a, float b) {
    return D(uint32_t(CvtToHalf<H, MODE>::f(F::f(a))) << 16 | CvtToHalf<H, MODE>::f(F::f(b)));
  }
};

// ------------------------------------------------------------------ atomics

template <class T> struct AtomExch { SIMT_F T f(T, T v) { return v; } };
template <class T> struct AtomCas { SIMT_F T f(T old, T expected, T v) { return old == expected ? v : old; } };
template <class T> struct AtomInc { SIMT_F T f(T old, T top) { return old >= top ? 0 : old + 1; } };
template <class T> struct AtomDec { SIMT_F T f(T old, T top) { return old == 0 || old > top ? top : old - 1; } };

}  // namespace simt
