// Two ways with AVX-512: fp32 or bf16 through fp32 (AVX512F alone, 16 weights a register), and bf16 as it is (VBMI2
// expands 32 weights, BF16 multiplies pairs of them into fp32).
#pragma once

#include <immintrin.h>

#include "problem.h"

namespace hf_cod {

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,popcnt")
#endif
namespace through_fp32 {

// Thirty-two weights: two registers.
struct Pair {
  __m512 low, high;
};

template <typename T>
struct Lanes {
  using Value = T;
  using Input = float;
  using Register = Pair;
  using Sum = __m512;
  static constexpr int kWidth = 32, kSums = 16;

  static inline __m512 zero() { return _mm512_setzero_ps(); }
  static inline __m512 load(__mmask16 lanes, const float* values) { return _mm512_maskz_loadu_ps(lanes, values); }
  static inline __m512 load(__mmask16 lanes, const uint16_t* values) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static inline Pair input(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }
  static inline Pair weights(uint32_t mask, const T* values) {
    const T* more = values + __builtin_popcount(mask & 0xffff);
    return {_mm512_maskz_expand_ps(mask, load(0xffff, values)), _mm512_maskz_expand_ps(mask >> 16, load(0xffff, more))};
  }
  // Reads no value behind those that the mask counts.
  static inline Pair weights_alone(uint32_t mask, const T* values) {
    const int low = __builtin_popcount(mask & 0xffff), high = __builtin_popcount(mask >> 16);
    return {_mm512_maskz_expand_ps(mask, load((1u << low) - 1, values)),
            _mm512_maskz_expand_ps(mask >> 16, load((1u << high) - 1, values + low))};
  }
  static inline __m512 add_product(__m512 sum, Pair w, Pair x) {
    return _mm512_fmadd_ps(w.high, x.high, _mm512_fmadd_ps(w.low, x.low, sum));
  }
  static inline float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
  static inline void store(float* dense, uint32_t lanes, Pair w) {
    _mm512_mask_storeu_ps(dense, lanes, w.low);
    if (lanes >> 16) _mm512_mask_storeu_ps(dense + 16, lanes >> 16, w.high);
  }
};

#include "tile.h"

}  // namespace through_fp32
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")
#endif
namespace in_bf16 {

struct Lanes {
  using Value = uint16_t;
  using Input = uint16_t;
  using Register = __m512i;
  using Sum = __m512;
  static constexpr int kWidth = 32, kSums = 16;

  static inline __m512 zero() { return _mm512_setzero_ps(); }
  static inline __m512i input(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static inline __m512i weights(uint32_t mask, const uint16_t* values) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
  }
  static inline __m512i weights_alone(uint32_t mask, const uint16_t* values) {
    return _mm512_maskz_expandloadu_epi16(mask, values);
  }
  static inline __m512 add_product(__m512 sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static inline float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
  static inline void store(uint16_t* dense, uint32_t lanes, __m512i w) { _mm512_mask_storeu_epi16(dense, lanes, w); }
};

#include "tile.h"

}  // namespace in_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace hf_cod
