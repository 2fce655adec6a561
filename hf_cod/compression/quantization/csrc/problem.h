// What a kernel is given: a matrix in three or four bits a weight, and the tokens that it is multiplied with. See
// format.py for the planes and nibbles, scales.py for the scales. Symbols as there: N rows, K columns, B weights to a
// scale; a run is a quarter of a row, K / 4 columns.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hf_cod {

constexpr int64_t kNested = 256;  // scales that share a scale
// With AVX-512, up to this number of tokens are multiplied with weights as they are decoded, and more through a tile.
constexpr int64_t kDirectTokens = 2;

struct Problem {
  int64_t N, K, block, tokens;
  bool four;              // bits, else three
  const uint8_t* planes;  // N x 3 K / 8; of four bits N x K / 2 bytes of two codes, the first in the high nibble
  const void* absmax;     // N x K / B: bytes where there is a table, else fp32
  const float* nested;    // ceil(N K / B / kNested)
  const float* table;     // 256: what codes of scales stand for; or null
  float offset;
  const float* codebook;  // 8, or 16
  const void* x;          // tokens x K, fp32 or bf16, in the order in which a row is read: step, run (of three), nibble,
                          // byte
  float* out;             // tokens x N
};

// The scales of a row. Not inlined into functions with FMA, where the compiler may fuse the sum and round once less.
C10_NOINLINE void decode_scales(const Problem& p, int64_t row, float* s) {
  const int64_t count = p.K / p.block, first = row * count;
  if (!p.table) {
    std::copy_n(static_cast<const float*>(p.absmax) + first, count, s);
    return;
  }
  const auto* codes = static_cast<const uint8_t*>(p.absmax) + first;
  for (int64_t i = 0; i < count;) {  // as far as scales share a scale, so that the loop inside is short
    const int64_t end = std::min(count, i + kNested - (first + i) % kNested);
    const float nested = p.nested[(first + i) / kNested];
    for (; i < end; ++i) {
      const float centred = p.table[codes[i]] * nested;
      s[i] = centred + p.offset;
    }
  }
}

}  // namespace hf_cod
