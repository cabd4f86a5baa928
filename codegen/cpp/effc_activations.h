// Activations, with torch.nn.functional's meaning and default parameters. T is float or double.
#pragma once

namespace effc {

template <class T>
EFFC_INLINE T relu(T x) { return maximum(x, T(0)); }

template <class T>
EFFC_INLINE T relu6(T x) { return clamp(x, T(0), T(6)); }

template <class T>
EFFC_INLINE T hardtanh(T x, T lo = T(-1), T hi = T(1)) { return clamp(x, lo, hi); }

template <class T>
EFFC_INLINE T threshold(T x, T t, T value) { return x <= t ? value : x; }

template <class T>
EFFC_INLINE T leaky_relu(T x, T slope = T(0.01)) { return x > T(0) ? x : x * slope; }

template <class T>
EFFC_INLINE T hardsigmoid(T x) { return clamp(x + T(3), T(0), T(6)) / T(6); }

template <class T>
EFFC_INLINE T hardswish(T x) { return x * clamp(x + T(3), T(0), T(6)) / T(6); }

template <class T>
EFFC_INLINE T silu(T x) { return x / (T(1) + detail::exp_minus(x)); }

template <class T>
EFFC_INLINE T gelu(T x) {  // x/2 (1 + erf(x / sqrt 2))
  if constexpr (std::is_same_v<T, float>) {
    return detail::gelu(x);
  } else {
    return x * T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));
  }
}

template <class T>
EFFC_INLINE T gelu_tanh(T x) {
  // 1 + tanh(u) = 2 sigmoid(2u): one exp, and no cancellation for negative x
  const T u = x * (T(1.5957691216057307) + T(0.071354816272600249) * x * x);
  return x / (T(1) + detail::exp_minus(u));
}

template <class T>
EFFC_INLINE T softplus(T x, T beta = T(1), T linear_above = T(20)) {
  const T z = x * beta;
  return z > linear_above ? x : log1p(exp(z)) / beta;
}

template <class T>
EFFC_INLINE T mish(T x) {
  // tanh(ln(1 + e^x)) = n / (n + 2), n = e^x (e^x + 2); it is 1 in float and double from 20 on
  const T e = exp(x > T(20) ? T(20) : x);
  const T n = e * (e + T(2));
  return x * (n / (n + T(2)));
}

template <class T>
EFFC_INLINE T log_sigmoid(T x) { return minimum(x, T(0)) - log1p(exp(-abs(x))); }

template <class T>
EFFC_INLINE T elu(T x, T alpha = T(1), T scale = T(1), T input_scale = T(1)) {
  return x <= T(0) ? expm1(x * input_scale) * (alpha * scale) : x * scale;
}

template <class T>
EFFC_INLINE T celu(T x, T alpha = T(1)) { return elu(x, alpha, T(1), T(1) / alpha); }

template <class T>
EFFC_INLINE T selu(T x) {
  return elu(x, T(1.6732632423543772848170429916717), T(1.0507009873554804934193349852946));
}

template <class T>
EFFC_INLINE T softsign(T x) { return x / (T(1) + abs(x)); }

template <class T>
EFFC_INLINE T tanhshrink(T x) { return x - tanh(x); }

template <class T>
EFFC_INLINE T hardshrink(T x, T lambda = T(0.5)) {
  return ((x >= -lambda) & (x <= lambda)) ? T(0) : x;
}

template <class T>
EFFC_INLINE T softshrink(T x, T lambda = T(0.5)) {
  return x > lambda ? x - lambda : (x < -lambda ? x + lambda : x * T(0));
}

}  // namespace effc
