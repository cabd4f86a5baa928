// softmax(scale q k^T + mask) v with q of half and keys and values of codes: see effc_flash.h.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention_of_codes_f16(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<effc::half, int8_t>(p, n, threads);
}
