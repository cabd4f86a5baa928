// x w^T of codes by their bits: see effc_planes.h for what p and n are.
#include "effc_planes.h"

EFFC_EXPORT void EFFC_NAME(char* const* p, const int64_t* n, int64_t threads) {
  effc::linear_of_planes<EFFC_P, EFFC_Q>(p, n, threads);
}
