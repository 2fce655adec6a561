// The same products in plain C++, for any processor: a run of weights is expanded to fp32 and multiplied, in loops
// that compilers vectorise.
#pragma once

#include <algorithm>

#include "problem.h"

#ifdef _MSC_VER
#define HF_COD_INLINE static __forceinline
#else
#define HF_COD_INLINE __attribute__((always_inline)) static inline
#endif

namespace hf_cod {

// Index of the lowest bit that is set.
HF_COD_INLINE int lowest_bit(uint64_t word) {
#ifdef _MSC_VER
  unsigned long index;
  _BitScanForward64(&index, word);
  return static_cast<int>(index);
#else
  return __builtin_ctzll(word);
#endif
}

// Writes one row's weights from mask byte `byte` on to `dense`, which holds 8 * bytes zeros; returns the values left.
template <typename From, typename To, typename Convert>
HF_COD_INLINE const From* expand(const uint8_t* mask, int64_t bytes, const From* values, To* dense, Convert convert) {
  for (int64_t byte = 0; byte < bytes; byte += 8) {
    uint64_t word = 0;
    for (int64_t i = std::min<int64_t>(8, bytes - byte); i-- > 0;) word = word << 8 | mask[byte + i];
    for (; word; word &= word - 1) dense[8 * byte + lowest_bit(word)] = convert(*values++);
  }
  return values;
}

// Rows begin..end; inputs are fp32.
template <typename Value>
static void run_portable(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t width = 512, lanes = 16;
  for (int64_t row = begin; row < end; ++row) {
    const auto* values = static_cast<const Value*>(p.values) + p.row_starts[row];
    for (int64_t t = 0; t < p.tokens; ++t) p.sums[t * p.rows + row] = 0;
    for (int64_t byte = 0; byte < p.mask_stride; byte += width / 8) {
      alignas(64) float weights[width] = {};
      const int64_t bytes = std::min(width / 8, p.mask_stride - byte);
      values = expand(p.mask + row * p.mask_stride + byte, bytes, values, weights,
                      [](Value value) { return to_float(value); });
      for (int64_t t = 0; t < p.tokens; ++t) {
        const float* x = static_cast<const float*>(p.x) + t * p.x_stride + 8 * byte;
        float sums[lanes] = {};
        // Inputs are padded to whole runs of lanes, weights behind the row's end are zero.
        for (int64_t j = 0; j < 8 * bytes; j += lanes)
          for (int64_t i = 0; i < lanes; ++i) sums[i] += weights[j + i] * x[j + i];
        float total = 0;
        for (float sum : sums) total += sum;
        p.sums[t * p.rows + row] += total;
      }
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define HF_COD_X86 1
#endif

}  // namespace hf_cod
