// Products of codes by their bits. With x = sum of 2^i x_i and w = sum of 2^j w_j, planes of bits,
//
//   sum over k of x w = sum over i, j of 2^(i + j) popcount(x_i & w_j)
//
// exactly; of numbers with a sign the top plane counts -2^(bits - 1). Planes of x are columns of a
// matrix instruction, so that one row of 8 bits fills it; 16 rows of a plane of w are its rows.
// (ABQ-LLM, sections 2.8 and 3.2)
//
// Both factors lie as the instruction's fragments, 256 codes a step:
//   w: [tiles of 16 rows][Q][steps][32 lanes][4], x: [BLOCKS][steps][32 lanes][2]
// where column c of x is plane c % P of its row c / P.
#pragma once

#include "effc_reduce.h"

namespace effc {

// ROWS of x in BLOCKS of 8 columns, by one tile of w; WARPS share the steps.
template <int P, int Q, bool X_SIGNED, bool W_SIGNED, int BLOCKS, int WARPS>
struct Planes {
  static constexpr int columns = 8 * BLOCKS;

  // parts: [WARPS][columns][16], what each warp counted.
  EFFC_INLINE void count(int32_t* parts, const uint32_t* w, const uint32_t* x, int steps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t sum[BLOCKS][4] = {};
#pragma unroll
    for (int j = Q - 1; j >= 0; --j) {  // from the top plane on: what is counted so far doubles
      const int32_t factor = W_SIGNED && j == Q - 2 ? -2 : 2;
      if (j < Q - 1) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[b][i] *= factor;
        }
      }
      const uint32_t* const plane = w + (j * steps * 32 + lane) * 4;
#pragma unroll 4
      for (int s = warp; s < steps; s += WARPS) {
        uint32_t rows[4];
        load_run<true>(rows, plane + s * 128, 4);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          uint32_t bits[2];
          load_run<true>(bits, x + ((b * steps + s) * 32 + lane) * 2, 2);
          mma_b1_and(sum[b], rows, bits);
        }
      }
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t v = W_SIGNED && Q == 1 ? -sum[b][i] : sum[b][i];
        parts[(warp * columns + b * 8 + 2 * t + i % 2) * 16 + g + i / 2 * 8] = v;
      }
    }
  }

  // Of a row of x and one of the tile's 16.
  EFFC_INLINE int32_t total(const int32_t* parts, int row, int of_tile) {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      uint32_t counted = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) {
        counted += static_cast<uint32_t>(parts[(warp * columns + row * P + i) * 16 + of_tile]);
      }
      sum += X_SIGNED && i == P - 1 ? 0u - (counted << i) : counted << i;
    }
    return static_cast<int32_t>(sum);
  }
};

// A row of codes, a byte each, as planes in the place of its columns; the block's sum of the codes.
template <int P, int WARPS, class T>
EFFC_INLINE int32_t to_planes(uint32_t* to, const T* codes, int row, int depth, int steps,
                              unsigned char* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = 0;
  for (int word = warp; word < steps * 8; word += WARPS) {
    const int k = word * 32 + lane;
    const int32_t code = k < depth ? static_cast<int32_t>(codes[k]) : 0;
    sum += code;
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const uint32_t plane = ballot((code >> i & 1) != 0);
      if (lane == i) mine = plane;
    }
    if (lane < P) {
      const int column = row * P + lane;
      to[((column / 8 * steps + word / 8) * 32 + column % 8 * 4 + word % 4) * 2 + word % 8 / 4] = mine;
    }
  }
  return reduce<WARPS, Sum>(sum, 0, scratch);
}

}  // namespace effc
