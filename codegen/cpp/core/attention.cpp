// softmax(scale q k^T + mask) v of float32: see effc_flash.h for what p and n are.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<float>(p, n, threads);
}
