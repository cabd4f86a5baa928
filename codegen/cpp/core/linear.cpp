// x w^T of float32: see effc_linear.h for what p and n are.
#include "effc_linear.h"

EFFC_EXPORT void effc_linear(char* const* p, const int64_t* n, int64_t threads) {
  effc::linear<float>(p, n, threads);
}
