// What a kernel is given: a matrix without its zeros, and the tokens that it is multiplied with.
#pragma once

#include <cstdint>
#include <cstring>

namespace hf_cod {

// Far enough ahead for memory to answer in time; farther ahead evicts what is still needed.
constexpr int kPrefetchBytes = 1024;
// Weights that a step takes of a row: one word of the mask.
constexpr int kWord = 32;

struct Problem {
  int64_t rows, columns;
  const uint8_t* mask;        // rows x mask_stride bytes; bit j % 8 of byte j / 8: whether weight j is stored
  int64_t mask_stride;        // columns / 8, rounded up
  const void* values;         // the stored weights, row after row
  const int64_t* row_starts;  // rows + 1: where each row's values begin
  const void* x;              // tokens x x_stride inputs, fp32 or bf16 as the kernel wants; zero from `columns` on
  int64_t x_stride, tokens;
  float* sums;                // tokens x rows
};

// bf16 travels as its 16 bits, the upper half of an fp32.
inline float to_float(float value) { return value; }
inline float to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace hf_cod
