import math
import sys

import pytest
import torch

from hf_cod.compression.quantization import native
from hf_cod.compression.quantization.bnb_decoding import dequantize_scales, quantize_scales
from hf_cod.compression.quantization.format import pack_nibbles, pack_planes
from hf_cod.compression.quantization.native import native_kernel
from hf_cod.functional.codebook import CODEBOOKS
from tests.fresh_processes import run_fresh

# Blocks of 32 only where runs are whole blocks; for the others also where runs end inside a block.
SIZES = [(5, 128, 32), (3, 64, 64), (1, 320, 64), (7, 768, 64), (4, 128, 128), (3, 640, 128), (2, 1536, 256)]


@pytest.fixture(scope="module", params=[3, 4])
def kernel(request):
    found = native._load(request.param)
    if found is None:
        pytest.skip("no C++ compiler, or a processor without AVX2")
    return found


def stored(kernel, N: int, K: int, block: int, double: bool):
    """(W, what the kernel takes between the tokens and the bias)."""
    torch.manual_seed(N + K)
    bits = int(math.log2(len(kernel._codebook)))
    c = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    tensors = quantize_scales(torch.randn(N, K // block), double)
    scales = tensors["absmax"], tensors.get("nested_absmax"), tensors.get("offset")
    W = torch.tensor(CODEBOOKS[bits])[c.long()] * dequantize_scales(*scales).view(N, -1).repeat_interleave(block, 1)
    return W, ((pack_planes if bits == 3 else pack_nibbles)(c), *scales, block)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("N", "K", "block"), SIZES)
def test_rows_are_decoded_bit_for_bit(N, K, block, double, kernel):
    W, matrix = stored(kernel, N, K, block, double)
    for instructions in kernel.instructions:
        assert torch.equal(kernel.rows(*matrix, slice(0, N), instructions=instructions), W)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(kernel.rows(*matrix, slice(1, N), dtype, instructions), W[1:].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "block"), SIZES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 13, 16])
def test_product(T, N, K, block, dtype, kernel):
    W, matrix = stored(kernel, N, K, block, T % 2 == 0)
    x, bias = torch.randn(T, K).to(dtype), torch.randn(N).to(dtype)
    for instructions in kernel.instructions:
        rounded = (
            instructions == "avx512_bf16" and dtype == torch.bfloat16 and T > 2 and in_wide_steps(kernel, K, block)
        )
        for b in (None, bias):
            found = kernel.product(x, *matrix, b, instructions)
            assert found.dtype == dtype and found.shape == (T, N)
            check_product(found, x, W.bfloat16() if rounded else W, b)


def test_products_see_the_weights_that_are_decoded(kernel):
    """Products with unit vectors are the weights, also where the last bit of a scale decides their rounding."""
    W, matrix = stored(kernel, 88, 768, 64, True)
    unit = torch.eye(768, dtype=torch.bfloat16)
    for instructions in kernel.instructions:
        for x in (unit, unit.float()):
            for tokens in (x, x[:1], x[5:7]):
                found = kernel.product(tokens, *matrix, None, instructions)
                assert torch.equal(found, (tokens.float() @ W.T).to(x.dtype))


def in_wide_steps(kernel, K: int, block: int) -> bool:
    """Whether 32 bytes of a plane, or of nibbles, share a scale, as AVX-512 requires."""
    return block % 64 == 0 and (len(kernel._codebook) == 16 or K // block % 4 == 0)


def check_product(found, x, W, bias):
    """Summed in float32, rounded once."""
    expected = x.double() @ W.double().T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ W.double().abs().T
    limit = 1e-6 * sizes + torch.finfo(x.dtype).eps * expected.abs() + 1e-7
    assert ((found.double() - expected).abs() <= limit).all()


@pytest.mark.slow
def test_products_of_200_random_shapes(kernel):
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    for _ in range(200):
        block = 32 * 2 ** draw(3)
        N, K, T = draw(90), block * draw(12), draw(140)
        W, matrix = stored(kernel, N, K, block, draw(2) == 1)
        # An odd offset, so that tokens are not aligned to registers.
        x = torch.randn(T * K + 1, generator=generator)[1:].view(T, K)
        for dtype in (torch.float32, torch.bfloat16):
            for instructions in kernel.instructions:
                rounded = instructions == "avx512_bf16" and dtype == torch.bfloat16 and T > 2
                held = W.bfloat16() if rounded and in_wide_steps(kernel, K, block) else W
                check_product(kernel.product(x.to(dtype), *matrix, None, instructions), x.to(dtype), held, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 17, 50])
def test_results_depend_on_neither_run_nor_threads(T, dtype, kernel):
    _, matrix = stored(kernel, 1001, 768, 64, True)
    x = torch.randn(T, 768).to(dtype)
    before = torch.get_num_threads()
    for instructions in kernel.instructions:
        found = []
        try:
            for threads in (1, 1, 2, 3):
                torch.set_num_threads(threads)
                found.append(kernel.product(x, *matrix, None, instructions))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(other, found[0]) for other in found[1:])


def test_unknown_instructions_are_refused(kernel):
    _, matrix = stored(kernel, 4, 256, 64, True)
    with pytest.raises(RuntimeError, match="instructions: expected one of"):
        kernel.product(torch.randn(1, 256), *matrix, None, "sse9")


def test_rows_on_several_threads(kernel):
    W, matrix = stored(kernel, 1500, 512, 64, True)
    x = torch.randn(2, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(kernel.product(x, *matrix, None), x @ W.T, atol=1e-4, rtol=1e-5)
        assert torch.equal(kernel.rows(*matrix, slice(0, 1500)), W)
    finally:
        torch.set_num_threads(before)


def test_tensors_that_do_not_belong_together_are_refused(kernel):
    _, (planes, absmax, nested, offset, block) = stored(kernel, 4, 256, 64, True)
    x = torch.randn(1, 256)
    for wrong in (
        (x[:, :128], planes, absmax, nested, offset, block),
        (x, planes[:, :90], absmax, nested, offset, block),
        (x, planes, absmax[:-1], nested, offset, block),
        (x, planes, absmax.float(), nested, offset, block),
        (x, planes, absmax, nested[:0], offset, block),
        (x, planes, absmax, nested, offset, 48),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            kernel.product(*wrong, None)


def test_sizes_that_it_cannot_multiply_go_another_way():
    planes = torch.zeros(2, 96 * 3 // 8, dtype=torch.uint8)
    assert native_kernel(planes, 32) is None
    assert native_kernel(torch.zeros(0, 24, dtype=torch.uint8), 64) is None
    assert native_kernel(planes.to("meta"), 64) is None


# What a machine without a compiler prints and computes.
WITHOUT = """
import torch
from hf_cod.compression.quantization import native, product
from hf_cod.compression.quantization.bnb_decoding import quantize_scales
from hf_cod.compression.quantization.format import pack_nibbles, pack_planes
stored = quantize_scales(torch.ones(6, 1))
planes = pack_planes(torch.full((6, 64), 7, dtype=torch.uint8))
for tokens in (1, 40):
    x = torch.randn(tokens, 64)
    found = product.multiply(x, planes, stored["absmax"], stored["nested_absmax"], stored["offset"], 64, None)
    torch.testing.assert_close(found, x.sum(1, keepdim=True).expand(-1, 6), atol=1e-4, rtol=1e-4)
assert native._load(3) is None and native._load(4) is None
"""


@pytest.mark.process
@pytest.mark.skipif(native.platform.machine() != "x86_64", reason="nothing is built for this processor")
def test_without_a_compiler_it_says_so_once_and_decodes(tmp_path):
    changes = {"HF_ASSETS_CACHE": str(tmp_path), "CXX": sys.executable, "OMP_NUM_THREADS": "1"}
    done = run_fresh(WITHOUT, environment=changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no kernel for 3-bit layers") == 1
    assert "apt install g++" in done.stderr and "bitsandbytes decodes them" in done.stderr
