// softmax(scale q k^T + mask) v of float16: see effc_flash.h for what p and n are.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention_of_f16(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<effc::half>(p, n, threads);
}
