// Element-wise ops with torch's meaning, each under torch's name. T is float, double or an integer
// type; bf16 and half are loaded to float first.
//
// Integer division by zero is an exception in torch. A kernel has no way to raise one, so here it
// gives 0: a caller that cannot rule it out must not use these.
#pragma once

namespace effc {
namespace detail {

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;

// Where integer overflow wraps: unsigned, and not so small that C++ promotes it back to int.
template <class T>
using Wrap = std::conditional_t<sizeof(T) <= 4, uint32_t, uint64_t>;

}  // namespace detail

// -- arithmetic; integers wrap around, bool is the boolean ring torch makes of it ------------------

template <class T>
EFFC_INLINE T add(T a, T b) {
  if constexpr (std::is_same_v<T, bool>) {
    return a || b;
  } else if constexpr (detail::is_float<T>) {
    return a + b;
  } else {
    return static_cast<T>(static_cast<detail::Wrap<T>>(a) + static_cast<detail::Wrap<T>>(b));
  }
}

template <class T>
EFFC_INLINE T sub(T a, T b) {
  if constexpr (detail::is_float<T>) {
    return a - b;
  } else {
    return static_cast<T>(static_cast<detail::Wrap<T>>(a) - static_cast<detail::Wrap<T>>(b));
  }
}

template <class T>
EFFC_INLINE T mul(T a, T b) {
  if constexpr (std::is_same_v<T, bool>) {
    return a && b;
  } else if constexpr (detail::is_float<T>) {
    return a * b;
  } else {
    return static_cast<T>(static_cast<detail::Wrap<T>>(a) * static_cast<detail::Wrap<T>>(b));
  }
}

template <class T>
EFFC_INLINE T neg(T x) {
  if constexpr (detail::is_float<T>) {
    return -x;
  } else {
    return sub(T(0), x);
  }
}

template <class T>
EFFC_INLINE T abs(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return ::fabsf(x);
  } else if constexpr (std::is_same_v<T, double>) {
    return ::fabs(x);
  } else if constexpr (std::is_signed_v<T>) {
    return x < 0 ? neg(x) : x;
  } else {
    return x;
  }
}

template <class T>
EFFC_INLINE T sign(T x) {  // 0 for NaN
  return static_cast<T>((x > T(0)) - (x < T(0)));
}

template <class T>
EFFC_INLINE T square(T x) { return mul(x, x); }

template <class T>
EFFC_INLINE T reciprocal(T x) { return T(1) / x; }

template <class T>
EFFC_INLINE T rsqrt(T x) { return T(1) / sqrt(x); }

template <class T>
EFFC_INLINE T frac(T x) { return x - trunc(x); }

template <class T>
EFFC_INLINE T lerp(T a, T b, T w) {
  const T d = b - a;
  return abs(w) < T(0.5) ? a + w * d : b - d * (T(1) - w);
}

// -- order; `maximum` and `minimum` (also amax, amin, clamp) keep a NaN, `fmax` and `fmin` drop it --

template <class T>
EFFC_INLINE T maximum(T a, T b) {
  if constexpr (detail::is_float<T>) {
    if (__builtin_constant_p(b) && b == b) return detail::at_least(b, a);
    const T larger = a > b ? a : b;  // b where one is a NaN
    return a != a ? a : larger;
  } else {
    return a > b ? a : b;
  }
}

template <class T>
EFFC_INLINE T minimum(T a, T b) {
  if constexpr (detail::is_float<T>) {
    if (__builtin_constant_p(b) && b == b) return detail::at_most(b, a);
    const T smaller = a < b ? a : b;
    return a != a ? a : smaller;
  } else {
    return a < b ? a : b;
  }
}

template <class T>
EFFC_INLINE T fmax(T a, T b) { return ((b > a) | (a != a)) ? b : a; }

template <class T>
EFFC_INLINE T fmin(T a, T b) { return ((b < a) | (a != a)) ? b : a; }

template <class T>
EFFC_INLINE T clamp(T x, T lo, T hi) { return minimum(maximum(x, lo), hi); }

template <class T>
EFFC_INLINE bool isnan(T x) { return x != x; }

template <class T>
EFFC_INLINE bool isinf(T x) { return abs(x) == std::numeric_limits<T>::infinity(); }

template <class T>
EFFC_INLINE bool isfinite(T x) { return abs(x) < std::numeric_limits<T>::infinity(); }

template <class T>
EFFC_INLINE T nan_to_num(T x, T nan = T(0), T posinf = std::numeric_limits<T>::max(),
                         T neginf = std::numeric_limits<T>::lowest()) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  return x != x ? nan : (x == inf ? posinf : (x == -inf ? neginf : x));
}

template <class T>
EFFC_INLINE T where(bool c, T a, T b) { return c ? a : b; }

// -- division ------------------------------------------------------------------------------------

template <class T>
EFFC_INLINE T trunc_divide(T a, T b) {
  if constexpr (detail::is_float<T>) {
    return trunc(a / b);
  } else {
    if (b == 0) return 0;
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return neg(a);  // the smallest integer / -1 traps
    }
    return static_cast<T>(a / b);
  }
}

template <class T>
EFFC_INLINE T remainder(T a, T b) {  // Python's %: the sign of b
  if constexpr (detail::is_float<T>) {
    const T m = fmod(a, b);
    return ((m != T(0)) & ((b < T(0)) != (m < T(0)))) ? m + b : m;
  } else {
    if (b == 0) return 0;
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return 0;
      const T m = static_cast<T>(a % b);
      return m != 0 && ((m < 0) != (b < 0)) ? static_cast<T>(m + b) : m;
    } else {
      return static_cast<T>(a % b);
    }
  }
}

template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
EFFC_INLINE T fmod(T a, T b) {  // C's %: the sign of a
  if constexpr (std::is_signed_v<T>) {
    if (b == T(-1)) return 0;
  }
  return b == 0 ? T(0) : static_cast<T>(a % b);
}

template <class T>
EFFC_INLINE T floor_divide(T a, T b) {  // Python's //
  if constexpr (detail::is_float<T>) {
    const T m = fmod(a, b);
    T d = (a - m) / b;
    d = ((m != T(0)) & ((b < T(0)) != (m < T(0)))) ? d - T(1) : d;
    T f = floor(d);
    f = d - f > T(0.5) ? f + T(1) : f;
    f = d != T(0) ? f : copysign(T(0), a / b);
    return b == T(0) ? a / b : f;
  } else {
    const T q = trunc_divide(a, b);
    if constexpr (std::is_signed_v<T>) {
      return b != 0 && mul(q, b) != a && ((a < 0) != (b < 0)) ? static_cast<T>(q - 1) : q;
    } else {
      return q;
    }
  }
}

// -- powers and logarithms -----------------------------------------------------------------------

template <class T>
EFFC_INLINE T pow(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    return ::powf(a, b);
  } else if constexpr (std::is_same_v<T, double>) {
    return ::pow(a, b);
  } else {
    if constexpr (std::is_signed_v<T>) {
      if (b < 0) {  // 1 / a^|b| cut to an integer
        const T odd = static_cast<T>(b & 1);
        return a == 1 ? T(1) : a == T(-1) ? (odd ? T(-1) : T(1)) : T(0);
      }
    }
    T r = 1;
    for (; b != 0; b = static_cast<T>(b >> 1), a = mul(a, a)) r = b & 1 ? mul(r, a) : r;
    return r;
  }
}

template <class T>
EFFC_INLINE T xlogy(T x, T y) {
  const T r = x == T(0) ? T(0) : x * log(y);
  return y != y ? y : r;
}

template <class T>
EFFC_INLINE T logaddexp(T a, T b) {
  const T m = maximum(a, b);
  return (isinf(a) & (a == b)) ? a : m + log1p(exp(-abs(a - b)));
}

template <class T>
EFFC_INLINE T logit(T x) { return log(x / (T(1) - x)); }

// -- bits; a shift by too much gives 0, or the sign ----------------------------------------------

template <class T>
EFFC_INLINE T bitwise_left_shift(T a, T b) {
  constexpr T bits = sizeof(T) * 8;
  const bool fits = (b >= T(0)) & (b < bits);
  return fits ? static_cast<T>(static_cast<detail::Wrap<T>>(a) << (fits ? b : 0)) : T(0);
}

template <class T>
EFFC_INLINE T bitwise_right_shift(T a, T b) {
  constexpr T most = sizeof(T) * 8 - (std::is_signed_v<T> ? 1 : 0);
  const bool fits = (b >= T(0)) & (b < most);
  return fits ? static_cast<T>(a >> (fits ? b : 0)) : static_cast<T>(a < T(0) ? -1 : 0);
}

// -- reductions: `#pragma omp simd reduction(effc::amax : m)` keeps a NaN, which `max` does not -----

#ifndef __CUDACC__
#define EFFC_REDUCTION(T)                                                             \
  _Pragma(EFFC_TEXT(omp declare reduction(amax : T : omp_out = maximum(omp_out, omp_in)) \
                        initializer(omp_priv = -std::numeric_limits<T>::infinity()))) \
  _Pragma(EFFC_TEXT(omp declare reduction(amin : T : omp_out = minimum(omp_out, omp_in)) \
                        initializer(omp_priv = std::numeric_limits<T>::infinity())))
#define EFFC_TEXT(...) #__VA_ARGS__

EFFC_REDUCTION(float)
EFFC_REDUCTION(double)

#undef EFFC_REDUCTION
#undef EFFC_TEXT
#endif

}  // namespace effc
