// softmax(scale q k^T + mask) v of bfloat16: see effc_flash.h for what p and n are.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention_of_bf16(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<effc::bf16>(p, n, threads);
}
