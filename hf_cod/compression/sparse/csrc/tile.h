// Included once for each instruction set, inside its namespace: no include guard.

// Sums of ROWS rows, `step` apart from `row` on, with TOKENS tokens from `token` on: each part of a word of the mask
// expands the values that follow into a register of weights. Some rows go together, so that their chains of pointers
// overlap and a register of inputs serves them all. Unless SAFE, whole registers of values are read, up to kWord values
// behind a row's end.
template <typename Lanes, int ROWS, int TOKENS, bool SAFE>
static void tile(const Problem& p, int64_t row, int64_t step, int64_t token) {
  const auto* x = static_cast<const typename Lanes::Input*>(p.x) + token * p.x_stride;
  const typename Lanes::Value* values[ROWS];
  const uint8_t* masks[ROWS];
  typename Lanes::Sum sums[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r) {
    values[r] = static_cast<const typename Lanes::Value*>(p.values) + p.row_starts[row + r * step];
    masks[r] = p.mask + (row + r * step) * p.mask_stride;
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = Lanes::zero();
  }
  const auto add_word = [&](int64_t byte, const uint32_t(&words)[ROWS]) {
#pragma GCC unroll 4
    for (int bit = 0; bit < kWord; bit += Lanes::kWidth) {
      typename Lanes::Register inputs[TOKENS];
      for (int t = 0; t < TOKENS; ++t) inputs[t] = Lanes::input(x + t * p.x_stride + 8 * byte + bit);
      for (int r = 0; r < ROWS; ++r) {
        const uint32_t mask = (words[r] >> bit) & (~0u >> (kWord - Lanes::kWidth));
        const auto weights = SAFE ? Lanes::weights_alone(mask, values[r]) : Lanes::weights(mask, values[r]);
        values[r] += __builtin_popcount(mask);
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = Lanes::add_product(sums[r][t], weights, inputs[t]);
      }
    }
  };
  uint32_t words[ROWS] = {};
  int64_t byte = 0;
  for (; byte + 4 <= p.mask_stride; byte += 4) {
    for (int r = 0; r < ROWS; ++r) {
      std::memcpy(&words[r], masks[r] + byte, 4);
      _mm_prefetch(reinterpret_cast<const char*>(values[r]) + kPrefetchBytes, _MM_HINT_T0);
    }
    add_word(byte, words);
  }
  if (byte < p.mask_stride) {
    for (int r = 0; r < ROWS; ++r) {
      words[r] = 0;
      std::memcpy(&words[r], masks[r] + byte, p.mask_stride - byte);
    }
    add_word(byte, words);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) p.sums[(token + t) * p.rows + row + r * step] = Lanes::total(sums[r][t]);
}

// TOKENS tokens of ROWS rows, as many of them at once as leave their sums in registers.
template <typename Lanes, int ROWS, int TOKENS, bool SAFE>
static void some_tokens(const Problem& p, int64_t row, int64_t step, int64_t token) {
  constexpr int fit = Lanes::kSums / TOKENS >= 4 ? 4 : Lanes::kSums / TOKENS >= 2 ? 2 : 1;
  constexpr int together = fit < ROWS ? fit : ROWS;
  for (int r = 0; r < ROWS; r += together) tile<Lanes, together, TOKENS, SAFE>(p, row + r * step, step, token);
}

// All tokens of ROWS rows.
template <typename Lanes, int ROWS, bool SAFE>
static void all_tokens(const Problem& p, int64_t row, int64_t step) {
  int64_t token = 0;
  // Eight at once pay where registers are left for two rows.
  if constexpr (Lanes::kSums >= 16)
    for (; token + 8 <= p.tokens; token += 8) some_tokens<Lanes, ROWS, 8, SAFE>(p, row, step, token);
  for (; token + 4 <= p.tokens; token += 4) some_tokens<Lanes, ROWS, 4, SAFE>(p, row, step, token);
  switch (p.tokens - token) {
    case 3: return some_tokens<Lanes, ROWS, 3, SAFE>(p, row, step, token);
    case 2: return some_tokens<Lanes, ROWS, 2, SAFE>(p, row, step, token);
    case 1: return some_tokens<Lanes, ROWS, 1, SAFE>(p, row, step, token);
  }
}

// Rows begin..end. Rows a quarter of them apart go together: four streams, each read from end to end.
template <typename Lanes>
static void run(const Problem& p, int64_t begin, int64_t end) {
  const int64_t quarter = (end - begin) / 4, readable = p.row_starts[p.rows] - kWord;
  for (int64_t row = begin; row < begin + quarter; ++row) {
    if (p.row_starts[row + 3 * quarter + 1] <= readable) all_tokens<Lanes, 4, false>(p, row, quarter);
    else for (int r = 0; r < 4; ++r) all_tokens<Lanes, 1, true>(p, row + r * quarter, 0);
  }
  for (int64_t row = begin + 4 * quarter; row < end; ++row) all_tokens<Lanes, 1, true>(p, row, 0);
}

// Writes one row's weights to `dense`. No value behind the row's is read.
template <typename Lanes>
static void expand_row(const uint8_t* mask_bytes, const typename Lanes::Value* values, typename Lanes::Value* dense,
                       int64_t columns) {
  for (int64_t column = 0; column < columns; column += Lanes::kWidth) {
    const int64_t left = columns - column;
    uint32_t mask = 0;
    std::memcpy(&mask, mask_bytes + column / 8, left < Lanes::kWidth ? (left + 7) / 8 : Lanes::kWidth / 8);
    Lanes::store(dense + column, left < Lanes::kWidth ? (1u << left) - 1 : ~0u, Lanes::weights_alone(mask, values));
    values += __builtin_popcount(mask);
  }
}
