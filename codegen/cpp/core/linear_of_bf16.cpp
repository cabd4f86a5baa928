// x w^T of bfloat16: see effc_linear.h for what p and n are.
#include "effc_linear.h"

EFFC_EXPORT void effc_linear_of_bf16(char* const* p, const int64_t* n, int64_t threads) {
  effc::linear<effc::bf16>(p, n, threads);
}
