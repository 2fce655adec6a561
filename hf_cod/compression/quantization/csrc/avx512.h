// Products and decoding with AVX-512, in fp32 and (with AVX512-BF16) in bf16.
//
// A table of values times the block's scale fills one register: 16 lanes of fp32, or 32 of bf16, so that one permutation
// looks up 16 or 32 codes. It reads only the low 4 or 5 bits of a lane; the table repeats, so that bits beside a code
// need not be cleared. A table of bytes (VBMI) would take two permutations and an interleaving for the same 32 weights.
//
// One or a few tokens are multiplied with weights as they are decoded. For more, rows are decoded into a tile that stays
// in the L2 cache, once for all tokens, and multiplied from there by four rows at a time.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "problem.h"

namespace hf_cod {
namespace avx512 {

constexpr int64_t kStep = 32;            // bytes of each plane that are looked up at a time
constexpr int64_t kTileBytes = 1 << 18;  // a quarter of a usual L2 cache: the tokens need the rest
constexpr int kTileRows = 4;             // rows that share each load of a token
constexpr int kTileTokens = 6;           // 4 x 6 sums, 4 weights and a token: of 32 registers

// Whether the weights of a step share a scale.
inline bool fits(int64_t K, int64_t block, bool four) { return block % 64 == 0 && (four || K / block % 4 == 0); }

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
#endif

// The codebook; one of eight values twice.
inline __m512 codebook_of(const Problem& p) {
  if (p.four) return _mm512_loadu_ps(p.codebook);
  return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(p.codebook))));
}

struct Fp32 {
  using Element = float;
  using Register = __m512;
  static constexpr int kLanes = 16, kRegisters = 4;

  static inline __m512 table(__m512 codebook, float scale) { return _mm512_mul_ps(codebook, _mm512_set1_ps(scale)); }

  // The weights of the high nibbles of 32 bytes in w[0], w[1], of the low ones in w[2], w[3].
  template <int HIGH, int LOW>
  static inline void look_up(__m512 table, __m256i bytes, __m512* w) {
    const __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
    const __m512i second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
    w[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(first, HIGH), table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(second, HIGH), table);
    w[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(first, LOW), table);
    w[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(second, LOW), table);
  }

  // Stores 64 weights in the order of their columns.
  static inline void store_columns(float* to, const __m512* w) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int half = 0; half < 2; ++half) {
      _mm512_storeu_ps(to + 32 * half, _mm512_permutex2var_ps(w[half], first, w[2 + half]));
      _mm512_storeu_ps(to + 32 * half + 16, _mm512_permutex2var_ps(w[half], second, w[2 + half]));
    }
  }

  static inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static inline void store(float* to, __m512 w) { _mm512_storeu_ps(to, w); }
  static inline __m512 add_product(__m512 sum, __m512 w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
};

#define HF_COD_TILES in_fp32
#define HF_COD_ELEMENT Fp32
#include "tile.h"
#undef HF_COD_TILES
#undef HF_COD_ELEMENT

// One row with TOKENS tokens from `token` on, whose weights are not rounded. Several sums, because each waits for its
// last.
template <bool FOUR, int TOKENS>
void row_product(const Problem& p, int64_t row, const float* s, int64_t token) {
  constexpr int kSums = 8 / TOKENS;
  __m512 sums[TOKENS][kSums];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < kSums; ++j) sums[t][j] = _mm512_setzero_ps();
  const float* x = static_cast<const float*>(p.x) + token * p.K;
  in_fp32::each_step<FOUR>(p, row, s, [&](int r, int64_t place, int64_t, const __m512* w) {
    for (int t = 0; t < TOKENS; ++t)
      for (int k = 0; k < 4; ++k) {
        __m512& to = sums[t][(4 * r + k) % kSums];
        to = _mm512_fmadd_ps(w[k], _mm512_loadu_ps(x + t * p.K + place + 16 * k), to);
      }
  });
  for (int t = 0; t < TOKENS; ++t) {
    for (int j = 1; j < kSums; ++j) sums[t][0] = _mm512_add_ps(sums[t][0], sums[t][j]);
    p.out[(token + t) * p.N + row] = _mm512_reduce_add_ps(sums[t][0]);
  }
}

template <bool FOUR>
void multiply_directly(const Problem& p, int64_t begin, int64_t end) {
  std::unique_ptr<float[]> s(new float[p.K / p.block]);
  for (int64_t row = begin; row < end; ++row) {
    decode_scales(p, row, s.get());
    if (p.tokens == 1) {
      row_product<FOUR, 1>(p, row, s.get(), 0);
    } else {
      row_product<FOUR, kDirectTokens>(p, row, s.get(), 0);
    }
  }
}

#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,fma")
#endif

// Conversion and products take subnormal numbers for zero, and round to nearest.
struct Bf16 {
  using Element = uint16_t;
  using Register = __m512i;
  static constexpr int kLanes = 32, kRegisters = 2;

  static inline __m512i table(__m512 codebook, float scale) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(scale))));
  }

  template <int HIGH, int LOW>
  static inline void look_up(__m512i table, __m256i bytes, __m512i* w) {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    w[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, HIGH), table);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, LOW), table);
  }

  static inline void store_columns(uint16_t* to, const __m512i* w) {
    const __m512i ordinals = _mm512_cvtepu8_epi16(_mm256_setr_epi8(
        0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46,
        15, 47));
    store(to, _mm512_permutex2var_epi16(w[0], ordinals, w[1]));
    store(to + 32, _mm512_permutex2var_epi16(w[0], _mm512_add_epi16(ordinals, _mm512_set1_epi16(16)), w[1]));
  }

  static inline __m512i load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static inline void store(uint16_t* to, __m512i w) { _mm512_storeu_si512(to, w); }
  static inline __m512 add_product(__m512 sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
};

#define HF_COD_TILES in_bf16
#define HF_COD_ELEMENT Bf16
#include "tile.h"
#undef HF_COD_TILES
#undef HF_COD_ELEMENT

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace avx512
}  // namespace hf_cod
