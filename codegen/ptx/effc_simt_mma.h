// Matrix instructions of a warp.
//
// In every mma fragment, a 32-bit register over the 32 lanes is a tile of 8 rows of 16 bytes, in
// order: lane 4 g + t holds bytes 4 t .. 4 t + 3 of row g. A has its tiles down the rows first, B is
// stored by columns, so a tile's row is a column of B. The accumulators hold two neighbouring
// columns of a row in two registers (f32, s32) or one (f16).
#pragma once

namespace simt {

typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t v4i __attribute__((vector_size(16)));

struct tf32 {};
struct s8 {};
struct u8 {};
struct s4 {};
struct u4 {};
struct e4m3 {};
struct e5m2 {};

template <class T> constexpr int width = 8;
template <> constexpr int width<f16> = 16;
template <> constexpr int width<bf16> = 16;
template <> constexpr int width<tf32> = 32;
template <> constexpr int width<s4> = 4;
template <> constexpr int width<u4> = 4;

// A tile as numbers: 8 rows of 128 / width.
template <class T>
SIMT_INLINE void untile(const uint32_t* tile, float* d) {
  constexpr int N = 8 * 128 / width<T>;
  const uint8_t* b = reinterpret_cast<const uint8_t*>(tile);
  if constexpr (width<T> == 16) {
    widen<T, N>(reinterpret_cast<const uint16_t*>(tile), d);
  } else if constexpr (std::is_same_v<T, tf32>) {
    for (int i = 0; i < N; i++) d[i] = bits<float>(tile[i] & 0xffffe000u);
  } else if constexpr (std::is_same_v<T, s8>) {
    for (int i = 0; i < N; i++) d[i] = float(int8_t(b[i]));
  } else if constexpr (std::is_same_v<T, u8>) {
    for (int i = 0; i < N; i++) d[i] = float(b[i]);
  } else if constexpr (std::is_same_v<T, e4m3>) {
    for (int i = 0; i < N; i++) d[i] = from_e4m3(b[i]);
  } else if constexpr (std::is_same_v<T, e5m2>) {
    for (int i = 0; i < N; i++) d[i] = from_e5m2(b[i]);
  } else {
    for (int i = 0; i < N; i++) {
      const int v = b[i / 2] >> 4 * (i & 1) & 15;
      d[i] = float(std::is_same_v<T, s4> && v > 7 ? v - 16 : v);
    }
  }
}

SIMT_INLINE v8f multiply_add(v8f a, v8f b, v8f c) {
#if defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  return a * b + c;
#endif
}

SIMT_INLINE void transpose8(const float* s, int stride, v8f* d) {
  v8f r[8], t[8];
  for (int i = 0; i < 8; i++) __builtin_memcpy(&r[i], s + i * stride, 32);
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    d[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    d[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Rows of C: two registers of 8 x 4 to 8 x 8.
template <class V>
SIMT_INLINE void rows_in(const uint32_t* even, const uint32_t* odd, V* row) {
  using half = std::conditional_t<std::is_same_v<V, v8f>, v4f, v4i>;
  for (int g = 0; g < 8; g++) {
    half a, b;
    __builtin_memcpy(&a, even + 4 * g, 16);
    __builtin_memcpy(&b, odd + 4 * g, 16);
    row[g] = __builtin_shufflevector(a, b, 0, 4, 1, 5, 2, 6, 3, 7);
  }
}
template <class V>
SIMT_INLINE void rows_out(const V* row, uint32_t* even, uint32_t* odd) {
  for (int g = 0; g < 8; g++) {
    const auto a = __builtin_shufflevector(row[g], row[g], 0, 2, 4, 6);
    const auto b = __builtin_shufflevector(row[g], row[g], 1, 3, 5, 7);
    __builtin_memcpy(even + 4 * g, &a, 16);
    __builtin_memcpy(odd + 4 * g, &b, 16);
  }
}

template <int N> struct Regs { const uint32_t* p[N]; };
template <int N> struct Outs { uint32_t* p[N]; };

// row += A B for M rows of 8 columns, A as [M][K].
template <int M, int K>
SIMT_INLINE void product(const float (*a)[K], const v8f* b, v8f* row) {
  for (int i = 0; i < M; i += 8) {
    v8f s[8];
    for (int j = 0; j < 8; j++) s[j] = row[i + j];
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) {
        const float x = a[i + j][k];
        s[j] = multiply_add(v8f{x, x, x, x, x, x, x, x}, b[k], s[j]);
      }
    for (int j = 0; j < 8; j++) row[i + j] = s[j];
  }
}

template <class TA, int M, int K, int NA>
SIMT_INLINE void load_a(const Regs<NA>& a, float (*m)[K]) {
  constexpr int E = 128 / width<TA>;  // of a tile's row
  for (int r = 0; r < NA; r++) {
    alignas(64) float t[8 * E];
    untile<TA>(a.p[r], t);
    const int row = 8 * (r % (M / 8)), col = E * (r / (M / 8));
    for (int g = 0; g < 8; g++) __builtin_memcpy(&m[row + g][col], t + g * E, sizeof(float) * E);
  }
}
template <class TB, int K, int NB>
SIMT_INLINE void load_b(const Regs<NB>& b, v8f* m) {
  constexpr int E = 128 / width<TB>;
  alignas(64) float t[8][NB * E];
  for (int r = 0; r < NB; r++) {
    alignas(64) float u[8 * E];
    untile<TB>(b.p[r], u);
    for (int g = 0; g < 8; g++) __builtin_memcpy(&t[g][E * r], u + g * E, sizeof(float) * E);
  }
  if constexpr (K % 8 == 0) {
    for (int k = 0; k < K; k += 8) transpose8(&t[0][k], NB * E, m + k);
  } else {
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) m[k][n] = t[n][k];
  }
}

// TC: float, f16 or int32_t. Products of 8 and 4 bits are exact in float, as is their sum: at most
// 64 * 255 * 255 < 2^24.
template <class TA, class TB, class TC, class TD, int M, int K, bool SAT, int ND, int NA, int NB, int NC>
SIMT_HOT void mma(Outs<ND> d, Regs<NA> a, Regs<NB> b, Regs<NC> c) {
  alignas(64) float am[M][K];
  v8f bm[K], row[M] = {};
  load_a<TA, M, K>(a, am);
  load_b<TB, K>(b, bm);
  if constexpr (std::is_same_v<TC, int32_t>) {
    product<M, K>(am, bm, row);
    v8i sum[M];
    for (int i = 0; i < M / 8; i++) rows_in(c.p[2 * i], c.p[2 * i + 1], sum + 8 * i);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 8; j++) {
        const int32_t v = int32_t(row[i][j]);
        sum[i][j] = SAT ? AddSat<int32_t>::f(sum[i][j], v) : Add<int32_t>::f(sum[i][j], v);
      }
    for (int i = 0; i < M / 8; i++) rows_out(sum + 8 * i, d.p[2 * i], d.p[2 * i + 1]);
  } else {
    if constexpr (std::is_same_v<TC, f16>) {
      for (int i = 0; i < M / 8; i++) widen<f16, 64>(reinterpret_cast<const uint16_t*>(c.p[i]), reinterpret_cast<float*>(row + 8 * i));
    } else {
      for (int i = 0; i < M / 8; i++) rows_in(c.p[2 * i], c.p[2 * i + 1], row + 8 * i);
    }
    product<M, K>(am, bm, row);
    if constexpr (std::is_same_v<TD, f16>) {
      for (int i = 0; i < M / 8; i++) narrow<f16, 64>(reinterpret_cast<const float*>(row + 8 * i), reinterpret_cast<uint16_t*>(d.p[i]));
    } else {
      for (int i = 0; i < M / 8; i++) rows_out(row + 8 * i, d.p[2 * i], d.p[2 * i + 1]);
    }
  }
}

template <bool XOR, int M, int ND, int NA, int NB, int NC>
SIMT_OP void mma_b1(Outs<ND> d, Regs<NA> a, Regs<NB> b, Regs<NC> c) {
  uint64_t am[M][2 * NB], bm[8][2 * NB];
  for (int r = 0; r < NA; r++)
    for (int g = 0; g < 8; g++) __builtin_memcpy(&am[8 * (r % (M / 8)) + g][2 * (r / (M / 8))], a.p[r] + 4 * g, 16);
  for (int r = 0; r < NB; r++)
    for (int g = 0; g < 8; g++) __builtin_memcpy(&bm[g][2 * r], b.p[r] + 4 * g, 16);
  uint32_t out[ND][32];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < 8; n++) {
      int s = 0;
      for (int k = 0; k < 2 * NB; k++) s += __builtin_popcountll(XOR ? am[i][k] ^ bm[n][k] : am[i][k] & bm[n][k]);
      const int r = 2 * (i / 8) + n % 2, l = 4 * (i % 8) + n / 2;
      out[r][l] = c.p[r][l] + uint32_t(s);
    }
  for (int r = 0; r < ND; r++) memcpy(d.p[r], out[r], sizeof out[r]);
}

// m8n8k4: A and B one double a lane, C two.
SIMT_OP void mma_f64(double* d0, double* d1, const double* a, const double* b, const double* c0, const double* c1) {
  double r[2][32];
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < 2; j++) {
      const int g = l / 4, n = (l % 4) * 2 + j;
      double s = j ? c1[l] : c0[l];
      for (int k = 0; k < 4; k++) s = std::fma(a[g * 4 + k], b[n * 4 + k], s);
      r[j][l] = s;
    }
  memcpy(d0, r[0], sizeof r[0]);
  memcpy(d1, r[1], sizeof r[1]);
}

// ------------------------------------------------------------------ tiles of 8 x 8 of 16 bits

SIMT_INLINE void transpose_tile(const uint16_t* s, uint16_t* d) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) d[i * 8 + j] = s[j * 8 + i];
}

template <bool TRANS, int S, class A, class... D>
SIMT_OP void ldmatrix(Warp& w, A address, int64_t off, D*... d) {
  constexpr int N = sizeof...(D);
  alignas(64) uint16_t t[N][64];
  for (int i = 0; i < 8 * N; i++) {
    const uint64_t p = uint64_t(at(address, i)) + off;
    if (allowed(w, i, S, READ, p, 16)) __builtin_memcpy(&t[i / 8][8 * (i % 8)], where<S>(w, i, p), 16);
    else memset(&t[i / 8][8 * (i % 8)], 0, 16);
  }
  int k = 0;
  auto one = [&](uint32_t* r) {
    if (TRANS) transpose_tile(t[k], reinterpret_cast<uint16_t*>(r));
    else memcpy(r, t[k], 128);
    k++;
  };
  (one(d), ...);
}
template <bool TRANS, int S, class A, class... V>
SIMT_OP void stmatrix(Warp& w, A address, int64_t off, V... v) {
  constexpr int N = sizeof...(V);
  alignas(64) uint16_t t[N][64];
  int k = 0;
  auto one = [&](const uint32_t* r) {
    if (TRANS) transpose_tile(reinterpret_cast<const uint16_t*>(r), t[k]);
    else memcpy(t[k], r, 128);
    k++;
  };
  (one(v), ...);
  for (int i = 0; i < 8 * N; i++) {
    const uint64_t p = uint64_t(at(address, i)) + off;
    const uint16_t* row = &t[i / 8][8 * (i % 8)];
    if (allowed(w, i, S, WRITE, p, 16, row)) __builtin_memcpy(where<S>(w, i, p), row, 16);
  }
}
SIMT_OP void movmatrix(uint32_t* d, const uint32_t* a) {
  alignas(64) uint16_t t[64];
  transpose_tile(reinterpret_cast<const uint16_t*>(a), t);
  memcpy(d, t, sizeof t);
}

}  // namespace simt
