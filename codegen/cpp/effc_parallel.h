// One parallel loop on the OpenMP runtime that torch has loaded.
//
// It calls the runtime's entry point itself instead of using `#pragma omp parallel`: that works
// with GNU's and with Intel's runtime, from g++ and from clang, whose own pragma needs a third
// runtime. Calls from several threads at once are fine: each gets a team of its own.
//
// After fork() the child has none of the runtime's threads, and GNU's runtime waits for them for
// ever. A kernel therefore runs on one thread in a forked child; the loader tells those that are
// loaded after the fork (effc_set_serial).
#pragma once

#if defined(EFFC_OPENMP)
#include <pthread.h>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

namespace effc {
namespace detail {

static bool serial = false;

template <class F>
EFFC_INLINE void call(F& body, int64_t begin, int64_t end, int64_t part) {
  if constexpr (std::is_invocable_v<F&, int64_t, int64_t, int64_t>) {
    body(begin, end, part);
  } else {
    body(begin, end);
  }
}

}  // namespace detail

// Calls body(begin, end), or body(begin, end, part), on disjoint ranges that cover [0, n). There
// are at most `threads` parts, numbered from 0, none smaller than `grain` but the only one. A single
// part is done by the calling thread, with no call to OpenMP.
template <class F>
static inline void parallel_for(int64_t n, int64_t grain, int64_t threads, F&& body) {
  if (n <= 0) return;
  int64_t parts = grain > 1 ? n / grain : n;
  parts = parts < threads ? parts : threads;
#if defined(EFFC_OPENMP)
  if (parts > 1 && !detail::serial) {
    struct Loop {
      std::remove_reference_t<F>* body;
      int64_t n;
    } loop = {&body, n};
    auto run = [](void* p) {
      const Loop& l = *static_cast<Loop*>(p);
      // The runtime may give fewer threads than asked for (nested regions, OMP_THREAD_LIMIT).
      const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
      const int64_t each = l.n / parts, rest = l.n % parts;
      const int64_t begin = part * each + (part < rest ? part : rest);
      const int64_t end = begin + each + (part < rest ? 1 : 0);
      if (begin < end) detail::call(*l.body, begin, end, part);
    };
    GOMP_parallel(run, &loop, static_cast<unsigned>(parts), 0);
    return;
  }
#endif
  detail::call(body, int64_t(0), n, int64_t(0));
}

}  // namespace effc

namespace effc {

// Memory for one part of a loop, aligned for the widest vectors; `release` gives it back.
template <class T>
EFFC_INLINE T* scratch(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = aligned_alloc(64, bytes ? bytes : 64);
  if (EFFC_UNLIKELY(!p)) abort();  // out of memory; a kernel has no way to say so
  return static_cast<T*>(p);
}

EFFC_INLINE void release(void* p) { free(p); }

}  // namespace effc

EFFC_EXPORT __attribute__((weak)) void effc_set_serial(int on) { effc::detail::serial = on != 0; }

#if defined(EFFC_OPENMP)
namespace effc {
namespace detail {
static const int at_fork = pthread_atfork(nullptr, nullptr, [] { serial = true; });
}  // namespace detail
}  // namespace effc
#endif
