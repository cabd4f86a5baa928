// Launches a list of GPU kernels on a stream. `d` holds one call after another, as the CPU's runner
// (codegen/cpp/runner.cpp) reads them:
//   function, pointers, numbers, (index into r, byte offset) per pointer, the numbers
// where the first three numbers are the grid. The driver's launch function is given by address, so
// nothing of CUDA is needed to build this.
#include "effc.h"

struct Function {
  void* handle;
  int64_t threads, shared;  // of a block
};

// cuLaunchKernel, or hipModuleLaunchKernel, which takes the same.
typedef int (*Launch)(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned shared, void* stream, void** arguments, void** more);

EFFC_EXPORT int64_t effc_launch(const int64_t* d, int64_t calls, char* const* r, Launch launch,
                                void* stream) {
  constexpr int64_t MOST = 160;
  int64_t values[MOST];
  void* arguments[MOST];
  for (int64_t i = 0; i < MOST; ++i) arguments[i] = values + i;
  for (int64_t call = 0; call < calls; ++call) {
    const Function& f = *reinterpret_cast<const Function*>(d[0]);
    const int64_t pointers = d[1], numbers = d[2] - 3;
    const int64_t *where = d + 3, *grid = where + 2 * pointers, *n = grid + 3;
    d = n + numbers;
    if (pointers + numbers + 2 > MOST) return -1;
    if (!grid[0] || !grid[1] || !grid[2]) continue;
    for (int64_t i = 0; i < pointers; ++i)
      values[i] = reinterpret_cast<int64_t>(r[where[2 * i]]) + where[2 * i + 1];
    for (int64_t i = 0; i < numbers; ++i) values[pointers + i] = n[i];
    // Triton's kernels end with two addresses of scratch memory, which ours do without.
    values[pointers + numbers] = values[pointers + numbers + 1] = 0;
    const int status = launch(f.handle, unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2]),
                              unsigned(f.threads), 1, 1, unsigned(f.shared), stream, arguments, nullptr);
    if (status) return status;
  }
  return 0;
}
