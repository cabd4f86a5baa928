// Runs a list of kernel calls. `d` holds one call after another:
//   kernel address, pointers, numbers, (index into r, byte offset) per pointer, the numbers
// and r the addresses of inputs, weights, the arena and outputs.
#include "effc.h"

typedef void (*Kernel)(char* const* p, const int64_t* n, int64_t threads);

EFFC_EXPORT void effc_run(const int64_t* d, int64_t calls, char* const* r, int64_t threads) {
  char* p[64];
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t pointers = d[1], numbers = d[2];
    const int64_t* where = d + 3;
    for (int64_t i = 0; i < pointers; ++i) p[i] = r[where[2 * i]] + where[2 * i + 1];
    const int64_t* n = where + 2 * pointers;
    reinterpret_cast<Kernel>(d[0])(p, n, threads);
    d = n + numbers;
  }
}
