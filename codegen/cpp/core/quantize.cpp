// Numbers to the nearest codes of 8 bits or fewer, with a scale (and zero) for every group of a row.
#include "effc_rows.h"

namespace effc {
namespace {

// v rounded to the type of scales, and put there.
EFFC_INLINE float put_scale(int64_t kind, char* to, int64_t at, float v, float tiny) {
  if (kind == 1) v = round_to<half>(v);
  if (kind == 2) v = round_to<bf16>(v);
  v = v < tiny ? tiny : v;
  if (kind == 0) reinterpret_cast<float*>(to)[at] = v;
  if (kind == 1) reinterpret_cast<half*>(to)[at] = v;
  if (kind == 2) reinterpret_cast<bf16*>(to)[at] = v;
  return v;
}

// Least and largest of n numbers, and 0; none where one is no number.
EFFC_INLINE void span(const float* x, int64_t n, float& low, float& high) {
  float least = 0.0f, most = 0.0f;
  int32_t odd = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(| : odd)
  for (int64_t k = 0; k < n; ++k) {
    least = x[k] < least ? x[k] : least;
    most = x[k] > most ? x[k] : most;
    odd |= x[k] != x[k];
  }
  low = odd ? NAN : least, high = odd ? NAN : most;
}

template <class T>
static void quantize(char* const* p, const int64_t* n, int64_t threads) {
  const int64_t rows = n[0], size = n[1], ldx = n[2], ldy = n[3], kind = n[6];
  const int64_t group = n[7] ? n[7] : size, groups = n[7] ? (size + group - 1) / group : 1;
  const float first = static_cast<float>(n[4]), last = static_cast<float>(n[5]);
  const float tiny = kind == 1 ? 5.9604644775390625e-08f : 1e-30f;
  const bool zeros = n[8] != 0;
  const T* x = reinterpret_cast<const T*>(p[3]);
  parallel_for(rows, 1 + 65536 / (size + 1), threads, [=](int64_t begin, int64_t end) {
    float* row = scratch<float>(size);
    for (int64_t i = begin; i < end; ++i) {
      to_floats(x + i * ldx, row, size);
      uint8_t* y = reinterpret_cast<uint8_t*>(p[0]) + i * ldy;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * group, count = least(group, size - at);
        float low, high;
        span(row + at, count, low, high);
        const float symmetric = (high > -low ? high : -low) / (last > 1.0f ? last : 1.0f);
        const float step = zeros ? (high - low) / (last - first) : symmetric;
        const float inverse = 1.0f / put_scale(kind, p[1], i * groups + g, step, tiny);
        const float zero = zeros ? __builtin_rintf(-low * inverse) + first : 0.0f;
        if (zeros) reinterpret_cast<uint8_t*>(p[2])[i * groups + g] = static_cast<uint8_t>(static_cast<int32_t>(zero));
#pragma omp simd
        for (int64_t k = at; k < at + count; ++k) {
          const float code = __builtin_rintf(row[k] * inverse) + zero;
          const float held = code < first ? first : code > last ? last : code;
          y[k] = static_cast<uint8_t>(static_cast<int32_t>(held));
        }
      }
      memset(y + size, 0, ldy - size);
    }
    release(row);
  });
}

}  // namespace
}  // namespace effc

// p: codes [rows, whole units, filled up with zeros], scales and zeros [rows, groups], x. n: rows, columns, steps
// between rows of x and of the codes, least and largest code, the type of scales (float, half, bfloat16),
// elements of a group or 0 for a whole row, whether there are zeros, the type of x.
EFFC_EXPORT void effc_quantize(char* const* p, const int64_t* n, int64_t threads) {
  if (n[9] == 0) effc::quantize<float>(p, n, threads);
  if (n[9] == 1) effc::quantize<effc::half>(p, n, threads);
  if (n[9] == 2) effc::quantize<effc::bf16>(p, n, threads);
}
