// x w^T with a matrix of which only some groups of a row are kept: see effc_sparse.h for what p and n are.
#include "effc_sparse.h"

EFFC_EXPORT void EFFC_NAME(char* const* p, const int64_t* n, int64_t threads) { effc::sparse(p, n, threads); }
