// x w^T of floats with codes of @BITS@ bits: see effc_codes_floats.h for what p and n are.
#include "effc_codes_floats.h"

EFFC_EXPORT void effc_linear_of_codes_by_floats@BITS@(char* const* p, const int64_t* n, int64_t threads) {
  effc::linear_of_codes_by_floats<@BITS@>(p, n, threads);
}
