// A block's part of a matrix product in half or bf16, with float sums on the tensor cores.
//
// Tiles of both operands go from global to shared memory by asynchronous copies, STAGES of them in
// flight or in use; from there to fragments by ldmatrix. Runs of 8 elements (16 bytes) of a tile are
// permuted within its rows so that the eight rows a matrix of ldmatrix reads, and the eight that
// cp.async writes, lie in different banks: run c of row r is stored at c ^ (r / rows a 128-byte line).
#pragma once

#include "effc_cuda.h"

namespace effc {

// ROWS x COLUMNS elements of 16 bits in shared memory.
template <int ROWS, int COLUMNS>
struct SharedTile {
  static constexpr int runs = COLUMNS / 8;
  static constexpr int per_line = runs < 8 ? 8 / runs : 1;  // rows in 128 bytes, all banks once
  static constexpr int bytes = ROWS * COLUMNS * 2;
  static_assert(COLUMNS % 8 == 0 && (runs & (runs - 1)) == 0, "a power of two of runs");

  EFFC_INLINE int place(int row, int run) {  // in bytes
    return (row * runs + (run ^ (row / per_line & (runs < 8 ? runs - 1 : 7)))) * 16;
  }

  // Fill the tile from a matrix whose elements of a row lie together; zero outside of it. `rows`
  // and `columns` of the matrix are left from `from` on. Addresses are multiples of VECTOR elements.
  template <int THREADS, int VECTOR, class T>
  EFFC_INLINE void copy(unsigned char* to, const T* from, int64_t stride, int64_t rows,
                        int64_t columns) {
    constexpr int count = ROWS * runs;
#pragma unroll
    for (int first = 0; first < count; first += THREADS) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (count % THREADS != 0 && i >= count) break;
      const int row = i / runs, run = i % runs;
      unsigned char* const p = to + place(row, run);
      const T* const source = from + row * stride + run * 8;
      const int64_t there = row < rows ? columns - run * 8 : 0;
      if constexpr (VECTOR == 1) {  // too narrow for asynchronous copies
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const uint32_t low = j < there ? source[j].bits : 0;
          const uint32_t high = j + 1 < there ? source[j + 1].bits : 0;
          *reinterpret_cast<uint32_t*>(p + 2 * j) = high << 16 | low;
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; j += VECTOR) {
          const int64_t left = there - j;
          const int valid = left >= VECTOR ? VECTOR : left > 0 ? static_cast<int>(left) : 0;
          // Nothing is read with valid = 0, but the address must be one of the matrix all the same.
          cp_async<2 * VECTOR>(p + 2 * j, valid > 0 ? source + j : from, 2 * valid);
        }
      }
    }
  }
};

// BM x BN sums over k. WM x WN warps, each a rectangle of whole fragments. a is rows of k elements;
// b too (one row a column of the result), or TURNED: k rows of elements. The VECTORs: elements that
// one copy moves.
template <class T, int BM, int BN, int BK, int WM, int WN, int STAGES, int A_VECTOR, int B_VECTOR,
          bool TURNED>
struct Product {
  static constexpr int threads = 32 * WM * WN;
  static constexpr int tall = BM / WM / 16, broad = BN / WN / 8;  // fragments of a warp
  static constexpr int pitch = BN + 8;  // floats from one row of sums to the next in shared memory
  static_assert(BM % (16 * WM) == 0 && BN % (16 * WN) == 0 && BK % 16 == 0, "whole fragments");
  static_assert(STAGES >= 2, "one stage is read while another is filled");
  using A = SharedTile<BM, BK>;
  using B = std::conditional_t<TURNED, SharedTile<BK, BN>, SharedTile<BN, BK>>;
  static constexpr int stage_bytes = A::bytes + B::bytes;

  // The sums, left in shared memory as rows of floats; every thread may read them on return.
  EFFC_INLINE const float* sums(unsigned char* shared, const T* a, int64_t a_stride, int64_t rows,
                                const T* b, int64_t b_stride, int64_t columns, int64_t k) {
    float d[tall][broad][4] = {};
    const int steps = static_cast<int>((k + BK - 1) / BK);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < steps) copy(shared, s, s, a, a_stride, rows, b, b_stride, columns, k);
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<STAGES - 2>();
      block_barrier();  // this step's tiles are there, and nobody reads those of the step before
      const int next = step + STAGES - 1;
      if (next < steps) {
        copy(shared, next % STAGES, next, a, a_stride, rows, b, b_stride, columns, k);
      }
      cp_async_commit();  // an empty group too: the count of groups is the count of steps
      multiply(d, shared + step % STAGES * stage_bytes);
    }
    cp_async_wait<0>();
    block_barrier();
    return spread(d, shared);
  }

 private:
  EFFC_INLINE void copy(unsigned char* shared, int stage, int step, const T* a, int64_t a_stride,
                        int64_t rows, const T* b, int64_t b_stride, int64_t columns, int64_t k) {
    unsigned char* const to = shared + stage * stage_bytes;
    const int64_t first = static_cast<int64_t>(step) * BK, left = k - first;
    A::template copy<threads, A_VECTOR>(to, a + first, a_stride, rows, left);
    if constexpr (TURNED) {
      B::template copy<threads, B_VECTOR>(to + A::bytes, b + first * b_stride, b_stride, left, columns);
    } else {
      B::template copy<threads, B_VECTOR>(to + A::bytes, b + first, b_stride, columns, left);
    }
  }

  EFFC_INLINE void multiply(float (&d)[tall][broad][4], const unsigned char* tiles) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int down = warp / WN * (BM / WM), across = warp % WN * (BN / WN);
    const unsigned char* const b_tile = tiles + A::bytes;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      uint32_t a[tall][4], b[broad][2];
#pragma unroll
      for (int i = 0; i < tall; ++i) {
        ldmatrix(a[i], tiles + A::place(down + 16 * i + lane % 16, k / 8 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < broad; j += 2) {  // four matrices are two fragments
        uint32_t both[4];
        const int column = across + 8 * j;
        if constexpr (TURNED) {
          const int row = k + lane % 16, run = column / 8 + lane / 16;
          ldmatrix<4, true>(both, b_tile + B::place(row, run));
        } else {
          const int row = column + lane % 8 + lane / 16 * 8, run = k / 8 + lane / 8 % 2;
          ldmatrix(both, b_tile + B::place(row, run));
        }
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < tall; ++i) {
#pragma unroll
        for (int j = 0; j < broad; ++j) mma<T>(d[i][j], a[i], b[j]);
      }
    }
  }

  // From fragments to rows, so that what follows reads and writes memory in whole lines.
  EFFC_INLINE const float* spread(const float (&d)[tall][broad][4], unsigned char* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int down = warp / WN * (BM / WM), across = warp % WN * (BN / WN);
    float* const to = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < tall; ++i) {
#pragma unroll
      for (int j = 0; j < broad; ++j) {
        float* const p = to + (down + 16 * i + lane / 4) * pitch + across + 8 * j + lane % 4 * 2;
        const float upper[2] = {d[i][j][0], d[i][j][1]}, lower[2] = {d[i][j][2], d[i][j][3]};
        store_run<true>(p, upper, 2);
        store_run<true>(p + 8 * pitch, lower, 2);
      }
    }
    block_barrier();
    return to;
  }
};

// Which tile of the result a block makes. Neighbouring blocks share operands in the second cache:
// they go down GROUP rows of tiles before they go across.
struct Place {
  int64_t row, column;  // in tiles
};
template <int GROUP>
EFFC_INLINE Place place_of(int64_t block, int64_t rows, int64_t columns) {
  const int64_t each = GROUP * columns, first = block / each * GROUP;
  const int64_t tall = rows - first < GROUP ? rows - first : GROUP;
  const int64_t within = block % each;
  return {first + within % tall, within / tall};
}

}  // namespace effc
