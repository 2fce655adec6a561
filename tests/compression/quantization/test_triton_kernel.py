import importlib.util
import os
import subprocess
import sys

import pytest

# Triton decides when it is imported whether it interprets, so this runs in a process of its own.
COMPARE = """
import itertools
import torch
from hf_cod.compression.quantization.bnb_decoding import quantize_scales
from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.compression.quantization.format import pack_planes
from hf_cod.compression.quantization.product import decoded_rows, multiply
from hf_cod.compression.quantization.triton_kernel import product

torch.set_grad_enabled(False)
# The interpreter's bfloat16 is rounded less well than a GPU's.
kinds = [(torch.float32, 32, 1e-6), (torch.bfloat16, 64, 1.6e-2), (torch.float16, 256, 2e-3)]
cases = [
    (*kind, number, *case)
    for kind in kinds
    # Rows that fill no tile; rows whose runs end inside a block; more than one step of a row.
    for sizes in [[(1, kind[1]), (19, 3 * kind[1]), (16, 4 * kind[1]), (9, 1024 + kind[1])]]
    for number, case in enumerate(
        zip(itertools.cycle(sizes), (1, 2, 16, 1, 5, 1), itertools.cycle((True, False, False)))
    )
]
for dtype, block, share, number, (N, K), T, double in cases:
    torch.manual_seed(number)
    stored = quantize_scales(torch.randn(N * K // block), double)
    planes = pack_planes(torch.randint(0, 8, (N, K), dtype=torch.uint8))
    scales = stored["absmax"], stored.get("nested_absmax"), stored.get("offset")
    x = torch.randn(T, K).to(dtype)
    bias = torch.randn(N).to(dtype) if number % 2 else None
    expected = multiply(x, planes, *scales, block, bias).double()
    W = torch.cat([W for _, W in decoded_rows(planes, *scales, block, torch.float64)])
    size = x.double().abs() @ W.abs().T + (0 if bias is None else bias.double().abs())
    found = product(x, planes, *scales, block, bias)
    assert found.dtype == dtype and found.shape == (T, N)
    error = ((found.double() - expected).abs() / size).max()
    assert error <= share, (dtype, block, N, K, T, double, float(error))
print(len(cases), "cases")

# The experts of a bank: their codes begin inside of one tensor, after those of four bits.
bank = QuantizedExperts(torch.Size((4, 19, 96)), 4, False, 0, torch.float32, "3433", block=32)
bank.weight.copy_(torch.randint(0, 256, bank.weight.shape, dtype=torch.uint8))
stored = [quantize_scales(torch.randn(19 * 96 // 32).abs(), True) for _ in range(4)]
for name, tensor in bank.scales.named_parameters():
    tensor.copy_(torch.stack([each[name] for each in stored]))
for expert, T in itertools.product((0, 2, 3), (1, 5)):
    codes, scales = bank.matrix_of(bank(), expert)
    x = torch.randn(T, 96)
    torch.testing.assert_close(product(x, codes, *scales, 32, None), x @ bank.decoded(bank(), expert, x.dtype).T)
print("experts")
"""


@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton for this platform")
def test_kernel_equals_the_operator_on_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "18 cases\nexperts\n"
