// x w^T of codes of @BITS@ bits with codes of 8 bits or fewer: see effc_codes_linear.h for what p and n are.
#include "effc_codes_linear.h"

EFFC_EXPORT void effc_linear_of_codes@BITS@(char* const* p, const int64_t* n, int64_t threads) {
  effc::linear_of_codes<@BITS@>(p, n, threads);
}
