// Stretches of rows between memory and a block in the nearest cache: 16-bit floats are converted
// there by whole vectors, and results that no cache will hold are written past all of them, which
// saves reading each line before it is overwritten.
#pragma once

namespace effc {

constexpr int64_t BLOCK = 1024;  // elements

// With F16C the processor converts eight at a time, about four times as fast as the loop g++ makes
// of half_to_float.
EFFC_INLINE void load_row(const half* p, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
  }
#endif
  for (; i < n; ++i) to[i] = detail::half_to_float(p[i].bits);
}

EFFC_INLINE void store_row(half* p, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) p[i].bits = detail::float_to_half(from[i]);
}

EFFC_INLINE void load_row(const bf16* p, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = detail::bf16_to_float(p[i].bits);
}

EFFC_INLINE void store_row(bf16* p, const float* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i].bits = detail::float_to_bf16(from[i]);
}

// A copy past the caches; whole lines only, as part of one would be read first after all.
template <class T>
EFFC_INLINE void stream_row(T* p, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX__)
  constexpr int64_t LINE = 64 / sizeof(T);
  for (; i < n && reinterpret_cast<uintptr_t>(p + i) % 64; ++i) p[i] = from[i];
  for (; i + LINE <= n; i += LINE) {
    const __m256i* line = reinterpret_cast<const __m256i*>(from + i);
    const __m256i low = _mm256_loadu_si256(line), high = _mm256_loadu_si256(line + 1);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + i) + 1, high);
  }
#endif
  for (; i < n; ++i) p[i] = from[i];
}

// Where results for p[0, n), n <= BLOCK, are put before `finish`: `block`, or p itself.
template <class T>
EFFC_INLINE float* begin(T* p, float* block, bool far) {
  if constexpr (std::is_same_v<T, float>) return far ? block : p;
  return block;
}

// Results in p[0, n) from where `begin` said; `far`: past the caches.
template <class T>
EFFC_INLINE void finish(T* p, const float* block, int64_t n, bool far) {
  if constexpr (std::is_same_v<T, float>) {
    if (far) stream_row(p, block, n);
  } else if (far) {
    T narrow[BLOCK];
    store_row(narrow, block, n);
    stream_row(p, static_cast<const T*>(narrow), n);
  } else {
    store_row(p, block, n);
  }
}

// After the last `finish` of a thread: others see what went past the caches only then.
EFFC_INLINE void settle(bool far) {
#if defined(__AVX__)
  if (far) _mm_sfence();
#endif
}

}  // namespace effc
