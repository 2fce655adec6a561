// torch.ops.hf_cod_sparse: products of tokens with a packed matrix, and its rows made dense again.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "portable.h"
#ifdef HF_COD_X86
#include "avx2.h"
#include "avx512.h"
#endif

namespace hf_cod {
namespace {

using at::Tensor;
using Run = void (*)(const Problem&, int64_t, int64_t);

// Inputs are padded to whole registers of any kernel.
constexpr int64_t kPadding = 32;
// Multiplications that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 16;

#ifdef HF_COD_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
}
#endif

struct Kernel {
  Run run;
  bool bf16_inputs;
  const char* name;
};

// What this processor can run, the fastest first.
template <typename Value>
std::vector<Kernel> find_kernels() {
  std::vector<Kernel> found;
#ifdef HF_COD_X86
  if constexpr (std::is_same_v<Value, uint16_t>)
    if (has_avx512_bf16()) found.push_back({in_bf16::run<in_bf16::Lanes>, true, "avx512_bf16"});
  if (has_avx512()) found.push_back({through_fp32::run<through_fp32::Lanes<Value>>, false, "avx512"});
  if (has_avx2()) found.push_back({avx2::run<avx2::Lanes<Value>>, false, "avx2"});
#endif
  found.push_back({run_portable<Value>, false, "portable"});
  return found;
}

const std::vector<Kernel>& kernels(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "values: expected float32 or bfloat16, got ", dtype);
  static const std::vector<Kernel> fp32 = find_kernels<float>(), bf16 = find_kernels<uint16_t>();
  return dtype == at::kFloat ? fp32 : bf16;
}

std::vector<std::string> names(at::ScalarType dtype) {
  std::vector<std::string> found;
  for (const Kernel& kernel : kernels(dtype)) found.emplace_back(kernel.name);
  return found;
}

const Kernel& choose(at::ScalarType dtype, const std::optional<c10::string_view>& name) {
  const auto& all = kernels(dtype);
  if (!name) return all.front();
  for (const Kernel& kernel : all)
    if (*name == kernel.name) return kernel;
  TORCH_CHECK(false, "instructions: expected one of ", names(dtype), ", got ", *name);
}

void check(const Tensor& mask, const Tensor& values, const Tensor& row_starts) {
  TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == at::kByte && mask.is_contiguous(), "mask: expected 2-D uint8");
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: expected one dimension");
  TORCH_CHECK(row_starts.scalar_type() == at::kLong && row_starts.is_contiguous() &&
                  row_starts.numel() == mask.size(0) + 1,
              "row_starts: expected int64, one more than rows");
  const auto* starts = row_starts.const_data_ptr<int64_t>();
  TORCH_CHECK(starts[0] == 0 && starts[mask.size(0)] == values.numel(), "row_starts: expected 0 ... len(values)");
}

// Sums of rows begin..end, plus bias, rounded to the output's dtype.
template <typename T>
void finish(const Problem& p, const std::optional<Tensor>& bias, T* out, int64_t begin, int64_t end) {
  const T* added = bias ? bias->const_data_ptr<T>() : nullptr;
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t row = begin; row < end; ++row)
      out[t * p.rows + row] = static_cast<T>(p.sums[t * p.rows + row] + (added ? static_cast<float>(added[row]) : 0.f));
}

// x (tokens, columns) times the transposed matrix, plus bias: (tokens, rows), summed in fp32. Without instructions
// named, the fastest that this processor has.
Tensor product(const Tensor& x, const Tensor& mask, const Tensor& values, const Tensor& row_starts,
               const std::optional<Tensor>& bias, std::optional<c10::string_view> instructions) {
  check(mask, values, row_starts);
  const int64_t columns = x.size(-1), rows = mask.size(0);
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == values.scalar_type(), "x: expected 2-D and of the values' dtype, ",
              values.scalar_type(), ", got ", x.dim(), "-D ", x.scalar_type());
  TORCH_CHECK((columns + 7) / 8 == mask.size(1), "x: expected as many columns as the matrix, got ", columns);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == rows && bias->scalar_type() == x.scalar_type()),
              "bias: expected one of the values' dtype for each row");
  const Kernel& kernel = choose(values.scalar_type(), instructions);
  Tensor inputs = x.to(kernel.bf16_inputs ? at::kBFloat16 : at::kFloat);
  inputs = columns % kPadding ? at::constant_pad_nd(inputs, {0, kPadding - columns % kPadding}) : inputs.contiguous();
  Tensor out = at::empty({x.size(0), rows}, x.options());
  const bool in_place = out.scalar_type() == at::kFloat;
  Tensor sums = in_place ? out : at::empty({x.size(0), rows}, x.options().dtype(at::kFloat));
  const Problem p{rows, columns, mask.const_data_ptr<uint8_t>(), mask.size(1), values.const_data_ptr(),
                  row_starts.const_data_ptr<int64_t>(), inputs.const_data_ptr(), inputs.size(1), x.size(0),
                  sums.mutable_data_ptr<float>()};
  const int64_t grain = kGrain / std::max<int64_t>(1, columns) + 4;
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    kernel.run(p, begin, end);
    if (in_place) {
      if (bias) finish(p, bias, out.mutable_data_ptr<float>(), begin, end);
    } else {
      finish(p, bias, out.mutable_data_ptr<at::BFloat16>(), begin, end);
    }
  });
  return out;
}

template <typename T>
void expand_row(const uint8_t* mask, const T* values, T* dense, int64_t columns) {
#ifdef HF_COD_X86
  if constexpr (sizeof(T) == 4) {
    if (has_avx512()) return through_fp32::expand_row<through_fp32::Lanes<float>>(
        mask, reinterpret_cast<const float*>(values), reinterpret_cast<float*>(dense), columns);
    if (has_avx2()) return avx2::expand_row<avx2::Lanes<float>>(
        mask, reinterpret_cast<const float*>(values), reinterpret_cast<float*>(dense), columns);
  } else if constexpr (sizeof(T) == 2) {
    if (has_avx512_bf16()) return in_bf16::expand_row<in_bf16::Lanes>(mask, values, dense, columns);
    if (has_avx2()) return avx2::expand_row<avx2::Lanes<uint16_t>>(mask, values, dense, columns);
  }
#endif
  std::fill(dense, dense + columns, T(0));
  expand(mask, (columns + 7) / 8, values, dense, [](T value) { return value; });
}

template <typename T>
void expand_rows(const Tensor& mask, const Tensor& values, const int64_t* starts, Tensor& dense, int64_t first) {
  const int64_t columns = dense.size(1), grain = kGrain / std::max<int64_t>(1, columns) + 4;
  const auto* bits = mask.const_data_ptr<uint8_t>() + first * mask.size(1);
  const auto* stored = static_cast<const T*>(values.const_data_ptr());
  auto* out = static_cast<T*>(dense.mutable_data_ptr());
  at::parallel_for(0, dense.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      expand_row(bits + row * mask.size(1), stored + starts[first + row], out + row * columns, columns);
  });
}

// Rows first..last as a dense matrix (last - first, columns); any dtype.
Tensor rows(const Tensor& mask, const Tensor& values, const Tensor& row_starts, int64_t columns, int64_t first,
            int64_t last) {
  check(mask, values, row_starts);
  TORCH_CHECK(0 <= first && first <= last && last <= mask.size(0), "rows: expected 0 <= first <= last <= rows");
  Tensor dense = at::empty({last - first, columns}, values.options());
  const auto* starts = row_starts.const_data_ptr<int64_t>();
  switch (values.element_size()) {
    case 2: expand_rows<uint16_t>(mask, values, starts, dense, first); break;
    case 4: expand_rows<uint32_t>(mask, values, starts, dense, first); break;
    case 8: expand_rows<uint64_t>(mask, values, starts, dense, first); break;
    default: TORCH_CHECK(false, "values: expected elements of 2, 4 or 8 bytes, got ", values.element_size());
  }
  return dense;
}

}  // namespace

TORCH_LIBRARY(hf_cod_sparse, m) {
  m.def(
      "product(Tensor x, Tensor mask, Tensor values, Tensor row_starts, Tensor? bias, str? instructions) -> Tensor");
  m.def("rows(Tensor mask, Tensor values, Tensor row_starts, int columns, int first, int last) -> Tensor");
  m.def("instructions(ScalarType dtype) -> str[]", &names);
}

TORCH_LIBRARY_IMPL(hf_cod_sparse, CPU, m) {
  m.impl("product", &product);
  m.impl("rows", &rows);
}

}  // namespace hf_cod
