// Eight weights a register, for processors without AVX-512: AVX2 has no expanding load, so a byte of the mask looks up
// where each weight comes from.
#pragma once

#include <immintrin.h>

#include "problem.h"

namespace hf_cod {

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif
namespace avx2 {

// For each byte of a mask and each of its eight bits: which of the values that follow stands there.
struct Sources {
  // As _mm256_permutevar8x32_ps reads it, which looks at three bits; negative where nothing is stored.
  alignas(32) int32_t lane[256][8];
  // The same as _mm256_shuffle_epi8 reads it: 16 bits go to the upper half of 32; 0x80 makes a zero.
  alignas(32) uint8_t byte[256][32];

  constexpr Sources() : lane(), byte() {
    for (int mask = 0; mask < 256; ++mask) {
      int stored = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool here = mask >> bit & 1;
        lane[mask][bit] = here ? stored : -1;
        byte[mask][4 * bit] = byte[mask][4 * bit + 1] = 0x80;
        byte[mask][4 * bit + 2] = here ? 2 * stored : 0x80;
        byte[mask][4 * bit + 3] = here ? 2 * stored + 1 : 0x80;
        stored += here;
      }
    }
  }
};
constexpr Sources kSources;

// fp32, or bf16 through fp32, whose upper half it is.
template <typename T>
struct Lanes {
  using Value = T;
  using Input = float;
  using Register = __m256;
  using Sum = __m256;
  // Weights in a register, and sums that leave room for them among sixteen registers.
  static constexpr int kWidth = 8, kSums = 8;

  static inline __m256 zero() { return _mm256_setzero_ps(); }
  static inline __m256 input(const float* x) { return _mm256_loadu_ps(x); }
  static inline __m256 weights(uint32_t mask, const float* values) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSources.lane[mask]));
    const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), moved);
  }
  static inline __m256 weights(uint32_t mask, const uint16_t* values) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const __m256i byte = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSources.byte[mask]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, byte));
  }
  // Reads no value behind those that the mask counts.
  static inline __m256 weights_alone(uint32_t mask, const T* values) {
    T few[8] = {};
    std::memcpy(few, values, sizeof(T) * __builtin_popcount(mask));
    return weights(mask, few);
  }
  static inline __m256 add_product(__m256 sum, __m256 w, __m256 x) { return _mm256_fmadd_ps(w, x, sum); }
  static inline float total(__m256 sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static inline void store(T* dense, uint32_t lanes, __m256 w) {
    T all[8];
    copy(lanes < 255 ? all : dense, w);
    if (lanes < 255) std::memcpy(dense, all, sizeof(T) * __builtin_popcount(lanes));
  }

 private:
  static inline void copy(float* to, __m256 w) { _mm256_storeu_ps(to, w); }
  static inline void copy(uint16_t* to, __m256 w) {
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(w), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
};

#include "tile.h"

}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace hf_cod
