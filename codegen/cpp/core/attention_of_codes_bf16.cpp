// softmax(scale q k^T + mask) v with q of bf16 and keys and values of codes: see effc_flash.h.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention_of_codes_bf16(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<effc::bf16, int8_t>(p, n, threads);
}
