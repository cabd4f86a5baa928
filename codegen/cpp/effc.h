// Runtime header of every generated CPU kernel.
//
// It holds what kernels share: storage types, element-wise functions named after the torch op they
// mean, and one parallel loop. It includes no torch header, so a kernel builds in well under a
// second; it keeps no state but one flag (see effc_parallel.h), so kernels of different instruction
// sets can live in one process.
//
// The code is written for -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast. Never add
// -ffast-math: infinities, NaN and signed zeros mean here what they mean in torch.
// A guard that a precompiled header keeps; it forgets #pragma once.
#ifndef EFFC_H
#define EFFC_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Forced, because a function the compiler leaves out of line stops `omp simd` loops around it.
#define EFFC_INLINE static inline __attribute__((always_inline))
#define EFFC_MEMBER inline __attribute__((always_inline))
#define EFFC_EXPORT extern "C" __attribute__((visibility("default")))
#define EFFC_RESTRICT __restrict__
#define EFFC_LIKELY(x) __builtin_expect(!!(x), 1)
#define EFFC_UNLIKELY(x) __builtin_expect(!!(x), 0)

// In this order: each needs the ones before it.
// clang-format off
#include "effc_types.h"
#include "effc_blocks.h"
#include "effc_math.h"
#include "effc_libm.h"
#include "effc_ops.h"
#include "effc_activations.h"
#include "effc_parallel.h"
#include "effc_moments.h"
// clang-format on

#endif
