// Sums and their like over the threads that share a row.
#pragma once

#include "effc_cuda.h"

namespace effc {

// Two parts of a reduction made one: `static T of(T, T)`, and what is neutral in it.
struct Sum {
  template <class T> EFFC_INLINE T of(T a, T b) { return add(a, b); }
};
struct Prod {
  template <class T> EFFC_INLINE T of(T a, T b) { return mul(a, b); }
};
struct Amax {
  template <class T> EFFC_INLINE T of(T a, T b) { return maximum(a, b); }
};
struct Amin {
  template <class T> EFFC_INLINE T of(T a, T b) { return minimum(a, b); }
};
struct Any {
  template <class T> EFFC_INLINE T of(T a, T b) { return a | b; }
};
struct All {
  template <class T> EFFC_INLINE T of(T a, T b) { return a & b; }
};

template <class How, class T>
EFFC_INLINE T reduce_warp(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = How::of(x, shuffle_xor(x, step));
  return x;
}

// Of WARPS warps, which are the whole block unless they are one. scratch: WARPS values that no other
// reduction of the kernel uses, so that one barrier is enough.
template <int WARPS, class How, class T>
EFFC_INLINE T reduce(T x, T neutral, unsigned char* scratch) {
  x = reduce_warp<How>(x);
  if constexpr (WARPS > 1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T* const parts = reinterpret_cast<T*>(scratch);
    if (lane == 0) parts[warp] = x;
    block_barrier();
    x = reduce_warp<How>(lane < WARPS ? parts[lane] : neutral);
  }
  return x;
}

}  // namespace effc
