// softmax(scale q k^T + mask) v with q of float32 and keys and values of codes: see effc_flash.h.
#include "effc_flash.h"

EFFC_EXPORT void effc_attention_of_codes_f32(char* const* p, const int64_t* n, int64_t threads) {
  effc::attention<float, int8_t>(p, n, threads);
}
