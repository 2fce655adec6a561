// Products and decoding with AVX2. A permutation of eight lanes looks eight codes up at once; four bits take two of them
// and a choice. The table of values is multiplied with the block's scale first, so each weight is what decoding gives,
// to the last bit.
#pragma once

#include <immintrin.h>

#include <vector>

#include "problem.h"

namespace hf_cod {
namespace avx2 {

constexpr int64_t kStep = 8;  // bytes of each plane that are looked up at a time, 64 weights in all
constexpr uint64_t kLow = 0x1111111111111111;

inline uint64_t load(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

#define HF_COD_AVX2 __attribute__((target("avx2,fma")))

// Calls use(r, place in x, column, high, low) with the weights of the high and the low nibbles of eight bytes: those of
// columns 2 i and 2 i + 1 from `column` on. r says which of four calls in a row it is, so that sums can be apart.
template <typename Use>
HF_COD_AVX2 __attribute__((always_inline)) inline void each_step_of_four(const Problem& p, int64_t row, const float* s,
                                                                         const Use& use) {
  const uint8_t* bytes = p.planes + row * (p.K / 2);
  const __m256 lower = _mm256_loadu_ps(p.codebook), upper = _mm256_loadu_ps(p.codebook + 8);
  const __m256i low_nibble = _mm256_set1_epi32(15);
  for (int64_t first = 0; first < p.K / 2; first += p.block / 2) {
    const __m256 scale = _mm256_set1_ps(s[2 * first / p.block]);
    const __m256 values[2] = {_mm256_mul_ps(lower, scale), _mm256_mul_ps(upper, scale)};
    const auto look_up = [&](__m256i code) HF_COD_AVX2 {  // the highest bit of a code says which half it is in
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values[0], code), _mm256_permutevar8x32_ps(values[1], code),
                              _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    };
    for (int64_t i = first; i < first + p.block / 2; i += 2 * kStep) {
      for (int r = 0; r < 2; ++r) {
        const int64_t at = i + r * kStep;
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(load(bytes + at))));
        use(r, 2 * at, 2 * at, look_up(_mm256_srli_epi32(wide, 4)), look_up(_mm256_and_si256(wide, low_nibble)));
      }
    }
  }
}

template <typename Use>
HF_COD_AVX2 __attribute__((always_inline)) inline void each_step_of_three(const Problem& p, int64_t row,
                                                                          const float* s, const Use& use) {
  const int64_t run = p.K / 8, blocks = p.K / p.block;
  const uint8_t* planes = p.planes + row * 3 * run;
  const __m256 codebook = _mm256_loadu_ps(p.codebook);
  // Bytes of a run that surely share a scale; runs that are whole blocks change scales at the same bytes.
  const int64_t part = blocks % 4 ? p.block / 8 : p.block / 2;
  for (int64_t first = 0; first < run; first += part) {
    __m256 values[4];
    for (int64_t r = 0; r < 4; ++r)
      values[r] = _mm256_mul_ps(codebook, _mm256_set1_ps(s[2 * (r * run + first) / p.block]));
    for (int64_t i = first; i < first + part; i += kStep) {
      uint64_t b[4] = {load(planes + i), load(planes + run + i), load(planes + 2 * run + i), 0};
      b[3] = (b[0] & kLow) << 1 | (b[1] & kLow) << 2 | (b[2] & kLow) << 3;
      for (int r = 0; r < 4; ++r) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(b[r])));
        use(r, 8 * i + 16 * r, r * (p.K / 4) + 2 * i,
            _mm256_permutevar8x32_ps(values[r], _mm256_srli_epi32(wide, 5)),
            _mm256_permutevar8x32_ps(values[r], _mm256_srli_epi32(wide, 1)));
      }
    }
  }
}

template <bool FOUR, typename Use>
HF_COD_AVX2 __attribute__((always_inline)) inline void each_step(const Problem& p, int64_t row, const float* s,
                                                                 const Use& use) {
  if constexpr (FOUR) {
    each_step_of_four(p, row, s, use);
  } else {
    each_step_of_three(p, row, s, use);
  }
}

HF_COD_AVX2 inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// One row with TOKENS tokens from `token` on. Eight sums at least, because each waits for its last.
template <bool FOUR, int TOKENS>
HF_COD_AVX2 void row_product(const Problem& p, int64_t row, const float* s, int64_t token) {
  constexpr int kSums = TOKENS < 8 ? 8 / TOKENS : 1;
  __m256 sums[TOKENS][kSums];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < kSums; ++j) sums[t][j] = _mm256_setzero_ps();
  const float* x = static_cast<const float*>(p.x) + token * p.K;
  each_step<FOUR>(p, row, s, [&](int r, int64_t place, int64_t, __m256 high, __m256 low) HF_COD_AVX2 {
    for (int t = 0; t < TOKENS; ++t) {
      const float* at = x + t * p.K + place;
      __m256 &first = sums[t][2 * r % kSums], &second = sums[t][(2 * r + 1) % kSums];
      first = _mm256_fmadd_ps(high, _mm256_loadu_ps(at), first);
      second = _mm256_fmadd_ps(low, _mm256_loadu_ps(at + 8), second);
    }
  });
  for (int t = 0; t < TOKENS; ++t) {
    for (int j = 1; j < kSums; ++j) sums[t][0] = _mm256_add_ps(sums[t][0], sums[t][j]);
    p.out[(token + t) * p.N + row] = sum(sums[t][0]);
  }
}

template <bool FOUR>
void multiply_rows(const Problem& p, int64_t begin, int64_t end) {
  std::vector<float> s(p.K / p.block);
  for (int64_t row = begin; row < end; ++row) {
    decode_scales(p, row, s.data());
    int64_t t = 0;
    for (; t + 8 <= p.tokens; t += 8) row_product<FOUR, 8>(p, row, s.data(), t);
    for (; t + 4 <= p.tokens; t += 4) row_product<FOUR, 4>(p, row, s.data(), t);
    for (; t < p.tokens; ++t) row_product<FOUR, 1>(p, row, s.data(), t);
  }
}

template <bool FOUR>
HF_COD_AVX2 void decode_row(const Problem& p, int64_t row, const float* s, float* W) {
  each_step<FOUR>(p, row, s, [&](int, int64_t, int64_t column, __m256 high, __m256 low) HF_COD_AVX2 {
    const __m256 first = _mm256_unpacklo_ps(high, low), second = _mm256_unpackhi_ps(high, low);
    float* at = W + column;
    _mm256_storeu_ps(at, _mm256_permute2f128_ps(first, second, 0x20));
    _mm256_storeu_ps(at + 8, _mm256_permute2f128_ps(first, second, 0x31));
  });
}

}  // namespace avx2
}  // namespace hf_cod
