// Decoding and products through a tile, for the numbers of HF_COD_ELEMENT. Without a guard: avx512.h includes it once for
// each kind of number, because functions take the instructions of the place where they are defined.

namespace HF_COD_TILES {

using Kind = HF_COD_ELEMENT;
using Element = Kind::Element;
using Register = Kind::Register;

// Calls use(run, place in x, column, weights) for each 64 weights of a row.
template <bool FOUR, typename Use>
__attribute__((always_inline)) inline void each_step(const Problem& p, int64_t row, const float* s, const Use& use) {
  const __m512 codebook = codebook_of(p);
  Register w[Kind::kRegisters];
  if constexpr (FOUR) {
    const uint8_t* bytes = p.planes + row * (p.K / 2);
    for (int64_t i = 0; i < p.K / 2; i += kStep) {
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
      Kind::look_up<4, 0>(Kind::table(codebook, s[2 * i / p.block]), b, w);
      use(0, 2 * i, 2 * i, w);
    }
  } else {
    const int64_t run = p.K / 8, scales = p.K / p.block / 4;
    const uint8_t* planes = p.planes + row * 3 * run;
    const __m256i low = _mm256_set1_epi8(0x11);
    const int64_t part = p.block / 2;  // bytes of a run that share a scale
    for (int64_t j = 0; j < scales; ++j) {
      for (int64_t i = j * part; i < (j + 1) * part; i += kStep) {
        __m256i b[4];
        for (int r = 0; r < 3; ++r)
          b[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + r * run + i));
        b[3] = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(b[0], low), 1),
                               _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(b[1], low), 2),
                                               _mm256_slli_epi16(_mm256_and_si256(b[2], low), 3)));
        for (int r = 0; r < 4; ++r) {
          Kind::look_up<5, 1>(Kind::table(codebook, s[r * scales + j]), b[r], w);
          use(r, 8 * i + 64 * r, r * (p.K / 4) + 2 * i, w);
        }
      }
    }
  }
}

// A row in the order of its columns.
template <bool FOUR>
void decode_row(const Problem& p, int64_t row, const float* s, Element* W) {
  each_step<FOUR>(p, row, s, [&](int, int64_t, int64_t column, const Register* w) {
    Kind::store_columns(W + column, w);
  });
}

// Four rows of a tile with TOKENS tokens. Each sum runs through the columns in one order, however many rows and tokens
// go with it, so that results depend on no partition.
template <int TOKENS>
void multiply_tile(const Element* W, const Element* x, int64_t K, float (*out)[kTileRows]) {
  __m512 sums[TOKENS][kTileRows];
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < kTileRows; ++r) sums[t][r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += Kind::kLanes) {
    Register w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = Kind::load(W + r * K + k);
    for (int t = 0; t < TOKENS; ++t) {
      const Register at = Kind::load(x + t * K + k);
      for (int r = 0; r < kTileRows; ++r) sums[t][r] = Kind::add_product(sums[t][r], w[r], at);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < kTileRows; ++r) out[t][r] = _mm512_reduce_add_ps(sums[t][r]);
}

inline void multiply_tokens(int64_t tokens, const Element* W, const Element* x, int64_t K, float (*out)[kTileRows]) {
  switch (tokens) {
    case 1: return multiply_tile<1>(W, x, K, out);
    case 2: return multiply_tile<2>(W, x, K, out);
    case 3: return multiply_tile<3>(W, x, K, out);
    case 4: return multiply_tile<4>(W, x, K, out);
    case 5: return multiply_tile<5>(W, x, K, out);
    default: return multiply_tile<kTileTokens>(W, x, K, out);
  }
}

// Rows begin..end with all tokens.
template <bool FOUR>
void multiply_rows(const Problem& p, int64_t begin, int64_t end) {
  const int64_t fitting = kTileBytes / (p.K * static_cast<int64_t>(sizeof(Element)));
  const int64_t rows = std::min(std::max<int64_t>(1, fitting / kTileRows), (end - begin + kTileRows - 1) / kTileRows) *
                       kTileRows;
  std::unique_ptr<float[]> s(new float[p.K / p.block]);
  std::unique_ptr<Element[]> tile(new Element[rows * p.K]());  // zeros where the last tile has no row
  const auto* x = static_cast<const Element*>(p.x);
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t count = std::min(rows, end - first);
    for (int64_t i = 0; i < count; ++i) {
      decode_scales(p, first + i, s.get());
      each_step<FOUR>(p, first + i, s.get(), [&](int, int64_t place, int64_t, const Register* w) {
        for (int k = 0; k < Kind::kRegisters; ++k) Kind::store(tile.get() + i * p.K + place + k * Kind::kLanes, w[k]);
      });
    }
    for (int64_t t = 0; t < p.tokens; t += kTileTokens) {
      const int64_t together = std::min<int64_t>(kTileTokens, p.tokens - t);
      for (int64_t i = 0; i < count; i += kTileRows) {
        float sums[kTileTokens][kTileRows];
        multiply_tokens(together, tile.get() + i * p.K, x + t * p.K, p.K, sums);
        for (int64_t j = 0; j < together; ++j)
          std::copy_n(sums[j], std::min<int64_t>(kTileRows, count - i), p.out + (t + j) * p.N + first + i);
      }
    }
  }
}

}  // namespace HF_COD_TILES
