// The double twins of effc_math.h, and the functions that are not worth a vector version: libm's.
// A loop over one of these runs one element at a time.
#pragma once

namespace effc {

#define EFFC_DOUBLE(name) \
  EFFC_INLINE double name(double x) { return ::name(x); }

EFFC_DOUBLE(cos)
EFFC_DOUBLE(erf)
EFFC_DOUBLE(exp)
EFFC_DOUBLE(exp2)
EFFC_DOUBLE(expm1)
EFFC_DOUBLE(log)
EFFC_DOUBLE(log10)
EFFC_DOUBLE(log1p)
EFFC_DOUBLE(log2)
EFFC_DOUBLE(sin)
EFFC_DOUBLE(tanh)
EFFC_INLINE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

#undef EFFC_DOUBLE

#define EFFC_UNARY(name)                               \
  EFFC_INLINE float name(float x) { return ::name##f(x); } \
  EFFC_INLINE double name(double x) { return ::name(x); }

EFFC_UNARY(acos)
EFFC_UNARY(acosh)
EFFC_UNARY(asin)
EFFC_UNARY(asinh)
EFFC_UNARY(atan)
EFFC_UNARY(atanh)
EFFC_UNARY(cosh)
EFFC_UNARY(erfc)
EFFC_UNARY(sinh)
EFFC_UNARY(tan)
// These are single instructions from SSE4.1 on, and vectorise.
EFFC_UNARY(ceil)
EFFC_UNARY(floor)
EFFC_UNARY(sqrt)
EFFC_UNARY(trunc)

#undef EFFC_UNARY

#define EFFC_BINARY(name)                                                  \
  EFFC_INLINE float name(float a, float b) { return ::name##f(a, b); }     \
  EFFC_INLINE double name(double a, double b) { return ::name(a, b); }

EFFC_BINARY(atan2)
EFFC_BINARY(copysign)
EFFC_BINARY(fmod)
EFFC_BINARY(hypot)
EFFC_BINARY(nextafter)

#undef EFFC_BINARY

// Half goes to even, as in torch.round.
EFFC_INLINE float round(float x) { return __builtin_rintf(x); }
EFFC_INLINE double round(double x) { return __builtin_rint(x); }

}  // namespace effc
