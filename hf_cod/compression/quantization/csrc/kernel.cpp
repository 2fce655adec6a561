// torch.ops.hf_cod_3bit: products of tokens with a matrix in three or four bits a weight, and its rows decoded.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "problem.h"
#ifdef __x86_64__
#include "avx2.h"
#include "avx512.h"
#endif

namespace hf_cod {
namespace {

using at::Tensor;
using Multiply = void (*)(const Problem&, int64_t, int64_t);

constexpr int64_t kGrain = 1 << 17;  // weights that are worth a thread

// What a processor can have, in the order of speed.
enum class Instructions { kNone, kAvx2, kAvx512, kAvx512Bf16 };

struct Named {
  Instructions set;
  const char* name;
};
constexpr Named kNames[] = {
    {Instructions::kAvx512Bf16, "avx512_bf16"}, {Instructions::kAvx512, "avx512"}, {Instructions::kAvx2, "avx2"}};

Instructions best() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Instructions::kAvx512Bf16 : Instructions::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Instructions::kAvx2;
#endif
  return Instructions::kNone;
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const Named& known : kNames)
    if (known.set <= best()) found.emplace_back(known.name);
  return found;
}

// Whether AVX-512 can read rows of so many bytes.
bool fits_avx512(int64_t bytes, int64_t block, bool four) {
#ifdef __x86_64__
  return avx512::fits(four ? bytes * 2 : bytes * 8 / 3, block, four);
#else
  return false;
#endif
}

// The instructions of this name, else the fastest; AVX2 where the steps of AVX-512 do not fit the blocks.
Instructions choose(const Problem& p, const std::optional<c10::string_view>& name) {
  Instructions found = name ? Instructions::kNone : best();
  for (const Named& known : kNames)
    if (name && *name == known.name && known.set <= best()) found = known.set;
  TORCH_CHECK(found != Instructions::kNone, "instructions: expected one of ", names(), ", got ", name.value_or("none"));
#ifdef __x86_64__
  if (!avx512::fits(p.K, p.block, p.four)) return Instructions::kAvx2;
#endif
  return found;
}

Problem describe(const Tensor& planes, const Tensor& absmax, const std::optional<Tensor>& nested,
                 const std::optional<Tensor>& offset, const std::optional<Tensor>& table, const Tensor& codebook,
                 int64_t block) {
  TORCH_CHECK(planes.dim() == 2 && planes.scalar_type() == at::kByte && planes.is_contiguous(),
              "planes: expected 2-D uint8");
  TORCH_CHECK(codebook.scalar_type() == at::kFloat && codebook.is_contiguous() &&
                  (codebook.numel() == 8 || codebook.numel() == 16),
              "codebook: expected 8 or 16 fp32 values");
  const bool four = codebook.numel() == 16;
  const int64_t N = planes.size(0), K = four ? planes.size(1) * 2 : planes.size(1) * 8 / 3;
  TORCH_CHECK(block > 0 && K % block == 0 && (four || K * 3 / 8 == planes.size(1)),
              "planes: expected rows of whole blocks");
  TORCH_CHECK(four ? block % 32 == 0 : (K / block % 4 ? block / 8 : block / 2) % 8 == 0,
              "block: expected a larger one, got ", block);
  const int64_t count = N * (K / block);
  TORCH_CHECK(absmax.is_contiguous() && absmax.numel() == count, "absmax: expected ", count, " scales");
  TORCH_CHECK(absmax.scalar_type() == (table ? at::kByte : at::kFloat), "absmax: expected uint8 with a table or fp32");
  if (table) {
    TORCH_CHECK(nested && offset && nested->scalar_type() == at::kFloat && nested->is_contiguous() &&
                    nested->numel() == (count + kNested - 1) / kNested && offset->scalar_type() == at::kFloat &&
                    offset->numel() == 1 && table->scalar_type() == at::kFloat && table->is_contiguous() &&
                    table->numel() == 256,
                "nested_absmax: expected a scale for each 256, an offset and a table of 256, all fp32");
  }
  return {N, K, block, 0, four, planes.const_data_ptr<uint8_t>(), absmax.const_data_ptr(),
          table ? nested->const_data_ptr<float>() : nullptr, table ? table->const_data_ptr<float>() : nullptr,
          table ? *offset->const_data_ptr<float>() : 0.f, codebook.const_data_ptr<float>(), nullptr, nullptr};
}

#ifdef __x86_64__
template <bool FOUR>
Multiply multiplication(Instructions set, bool in_bf16, int64_t tokens) {
  if (set == Instructions::kAvx2) return avx2::multiply_rows<FOUR>;
  if (in_bf16) return avx512::in_bf16::multiply_rows<FOUR>;
  return tokens <= kDirectTokens ? avx512::multiply_directly<FOUR> : avx512::in_fp32::multiply_rows<FOUR>;
}

template <bool FOUR, typename T>
void decode_row(const Problem& p, Instructions set, int64_t row, const float* s, T* to) {
  if constexpr (sizeof(T) == 2) {
    avx512::in_bf16::decode_row<FOUR>(p, row, s, to);
  } else if (set == Instructions::kAvx2) {
    avx2::decode_row<FOUR>(p, row, s, to);
  } else {
    avx512::in_fp32::decode_row<FOUR>(p, row, s, to);
  }
}
#else
template <bool FOUR>
Multiply multiplication(Instructions, bool, int64_t) { return nullptr; }
template <bool FOUR, typename T>
void decode_row(const Problem&, Instructions, int64_t, const float*, T*) {}
#endif

// x in the order in which the steps of a kernel, of so many bytes, read a row.
Tensor in_steps(const Tensor& x, bool four, int64_t step) {
  const int64_t tokens = x.size(0), K = x.size(1);
  return (four ? x.reshape({tokens, K / 2 / step, step, 2}).permute({0, 1, 3, 2})
               : x.reshape({tokens, 4, K / 8 / step, step, 2}).permute({0, 2, 1, 4, 3}))
      .contiguous();
}


// x (tokens, K) times the transposed matrix, plus bias: (tokens, N) in x's dtype, summed in fp32 and rounded once.
// Without instructions named, the fastest that this processor has.
Tensor product(const Tensor& x, const Tensor& planes, const Tensor& absmax, const std::optional<Tensor>& nested,
               const std::optional<Tensor>& offset, const std::optional<Tensor>& table, const Tensor& codebook,
               int64_t block, const std::optional<Tensor>& bias, std::optional<c10::string_view> instructions) {
  Problem p = describe(planes, absmax, nested, offset, table, codebook, block);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == p.K, "x: expected (tokens, ", p.K, "), got ", x.sizes());
  p.tokens = x.size(0);
  const Instructions set = choose(p, instructions);
  const bool in_bf16 =
      set == Instructions::kAvx512Bf16 && x.scalar_type() == at::kBFloat16 && p.tokens > kDirectTokens;
  const Tensor ordered =
      in_steps(in_bf16 ? x : x.to(at::kFloat), p.four, set == Instructions::kAvx2 ? 8 : 32);
  Tensor out = at::empty({p.tokens, p.N}, x.options().dtype(at::kFloat));
  p.x = ordered.const_data_ptr();
  p.out = out.mutable_data_ptr<float>();
  const Multiply multiply = p.four ? multiplication<true>(set, in_bf16, p.tokens)
                                   : multiplication<false>(set, in_bf16, p.tokens);
  at::parallel_for(0, p.N, kGrain / p.K + 1, [&](int64_t begin, int64_t end) { multiply(p, begin, end); });
  if (bias) out.add_(*bias);
  return out.to(x.scalar_type());
}

template <typename T>
void decode_rows(const Problem& p, Instructions set, int64_t first, int64_t last, T* to) {
  at::parallel_for(first, last, kGrain / p.K + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> s(p.K / p.block);
    for (int64_t row = begin; row < end; ++row) {
      decode_scales(p, row, s.data());
      (p.four ? decode_row<true, T> : decode_row<false, T>)(p, set, row, s.data(), to + (row - first) * p.K);
    }
  });
}

// Rows first..last of the matrix, (last - first, K) in dtype: decoded in fp32, and rounded once.
Tensor rows(const Tensor& planes, const Tensor& absmax, const std::optional<Tensor>& nested,
            const std::optional<Tensor>& offset, const std::optional<Tensor>& table, const Tensor& codebook,
            int64_t block, int64_t first, int64_t last, at::ScalarType dtype,
            std::optional<c10::string_view> instructions) {
  const Problem p = describe(planes, absmax, nested, offset, table, codebook, block);
  TORCH_CHECK(0 <= first && first <= last && last <= p.N, "rows: expected 0 <= first <= last <= N");
  const Instructions set = choose(p, instructions);
  const bool in_bf16 = set == Instructions::kAvx512Bf16 && dtype == at::kBFloat16;
  Tensor W = at::empty({last - first, p.K}, codebook.options().dtype(in_bf16 ? at::kBFloat16 : at::kFloat));
  if (in_bf16) {
    decode_rows(p, set, first, last, static_cast<uint16_t*>(W.mutable_data_ptr()));
  } else {
    decode_rows(p, set, first, last, W.mutable_data_ptr<float>());
  }
  return W.to(dtype);
}

}  // namespace

TORCH_LIBRARY(hf_cod_3bit, m) {
  m.def(
      "product(Tensor x, Tensor planes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? table, "
      "Tensor codebook, int block, Tensor? bias, str? instructions) -> Tensor");
  m.def(
      "rows(Tensor planes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? table, Tensor codebook, "
      "int block, int first, int last, ScalarType dtype, str? instructions) -> Tensor");
  m.def("instructions() -> str[]", &names);
  m.def("fits_avx512(int bytes, int block, bool four) -> bool", &fits_avx512);
}

TORCH_LIBRARY_IMPL(hf_cod_3bit, CPU, m) {
  m.impl("product", &product);
  m.impl("rows", &rows);
}

}  // namespace hf_cod
