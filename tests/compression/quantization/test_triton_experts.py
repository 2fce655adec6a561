import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton for this platform"),
]

# Triton decides when it is imported whether it interprets, so this runs in a process of its own. Its interpreter
# multiplies no matrices of bfloat16.
COMPARE = """
import torch
from hf_cod.compression.quantization import experts, triton_experts
from hf_cod.compression.quantization.bnb_decoding import quantize_scales
from hf_cod.compression.quantization.experts import QuantizedExperts, _places_on
from hf_cod.models.expert_parameters import ExpertView
from tests.compression.quantization.test_experts import quantized, tokens

torch.set_grad_enabled(False)
cases = [  # rows that fill no tile; rows padded to a block; runs that end inside of a block; several tiles and steps
    ("3433", 19, 90, 32, True, torch.float32, 1e-6, [3, 0, 20, 1]),
    (4, 70, 128, 64, False, torch.float16, 2e-3, [0, 0, 70, 0]),
    ("3334", 16, 576, 64, True, torch.float16, 2e-3, [5, 1, 1, 130]),
    (3, 130, 256, 256, True, torch.float32, 1e-6, [0, 17, 16, 0]),
]
for number, (bits, N, K, block, double, dtype, share, counts) in enumerate(cases):
    torch.manual_seed(number)
    bank = QuantizedExperts(torch.Size((4, N, K)), 4, False, 0, dtype, bits, block=block, double_quant=double)
    bank.weight.copy_(torch.randint(0, 256, bank.weight.shape, dtype=torch.uint8))
    stored = [quantize_scales(torch.randn(N * bank.columns // block), double) for _ in range(4)]
    for name, tensor in bank.scales.named_parameters():
        tensor.copy_(torch.stack([each[name] for each in stored]))
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(int(ends[-1]) + 2, K).to(dtype)
    experts.has_grouped_kernel = lambda tokens: True
    found = ExpertView(bank, None, True).grouped(x, ends.int())
    assert found.dtype == dtype and found.shape == (len(x), N) and not found[-2:].any()
    for e, (end, count) in enumerate(zip(ends.tolist(), counts)):
        mine, W = x[end - count : end].double(), bank.decoded(bank(), e, dtype).double()
        error = (found[end - count : end].double() - mine @ W.T).abs() - share * (mine.abs() @ W.abs().T)
        assert count == 0 or error.max() <= 0, (number, e)
print(len(cases), "cases")

calls, product = [], triton_experts.grouped_product
triton_experts.grouped_product = lambda *given: calls.append(len(given[0])) or product(*given)
for kind, more in (("mixtral", {}), ("gpt_oss", {"layer_types": ["full_attention"]})):  # both orientations
    model, _ = quantized(kind, num_hidden_layers=1, **more)
    for name in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        experts.has_grouped_kernel = lambda tokens: False
        expected = model(**tokens(8)).logits
        experts.has_grouped_kernel = lambda tokens: True
        calls.clear()
        torch.testing.assert_close(model(**tokens(8)).logits, expected, atol=1e-4, rtol=1e-4)
        assert calls == [16, 16], "one launch for all experts, for each of the two matrices"
print("models")
"""

# What the compiler makes for a GPU, without one.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_cod.compression.quantization.triton_experts import _multiply_grouped as kernel

types = {name: "*fp32" for name in kernel.arg_names} | dict.fromkeys(["places", "last_tiles", "owners"], "*i64")
types |= dict.fromkeys(["starts", "ends"], "*i32") | dict.fromkeys("ENK", "i32")
types |= {"x": "*bf16", "out": "*bf16", "codes": "*u8", "absmax": "*u8"}
sizes = {"BLOCK": 64, "NESTED": 256, "ROWS": 64, "TOKENS": 64, "PARTS": 4}
types |= dict.fromkeys(sizes, "constexpr")
source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): size for name, size in sizes.items()})
made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 1})
assert "mma.sync" in made.asm["ptx"] and made.metadata.shared <= 64 * 1024
print("compiled")
"""


def run(code, tmp_path, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_experts_in_one_launch(tmp_path):
    assert run(COMPARE, tmp_path, TRITON_INTERPRET="1").endswith("4 cases\nmodels\n")


def test_the_kernel_compiles_in_bfloat16_and_fits_the_memory_of_a_small_gpu(tmp_path):
    assert run(COMPILE, tmp_path) == "compiled\n"
