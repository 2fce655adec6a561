import pytest
import torch

from hf_cod.compression.quantization import product
from hf_cod.compression.quantization.bnb_decoding import dequantize_scales, quantize_scales
from hf_cod.compression.quantization.format import pack_planes
from hf_cod.compression.quantization.linear import Linear3bit
from hf_cod.compression.quantization.rounding import fill, new_module, round_matrix
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.functional.codebook import CODEBOOKS


def stored(N: int, K: int, block: int, double: bool):
    """(c, s, arguments of the operator between x and the bias)."""
    torch.manual_seed(N + K)
    c = torch.randint(0, 8, (N, K), dtype=torch.uint8)
    tensors = quantize_scales(torch.randn(N, K // block), double)
    scales = tensors["absmax"], tensors.get("nested_absmax"), tensors.get("offset")
    return c, dequantize_scales(*scales).view(N, -1), (pack_planes(c), *scales, block)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "block"), [(1, 32, 32), (5, 96, 32), (7, 192, 64), (3, 1024, 128), (2, 768, 256)])
def test_decoded_rows_are_the_codebook_times_the_scale_bit_for_bit(N, K, block, dtype, double):
    c, s, tensors = stored(N, K, block, double)
    W = torch.cat([W for _, W in product.decoded_rows(*tensors, dtype)])
    expected = torch.tensor(CODEBOOKS[3])[c.long()] * s.repeat_interleave(block, 1)
    assert W.dtype == dtype
    assert torch.equal(W, expected.to(dtype))


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_rows_come_in_chunks_and_all_of_them(chunk, monkeypatch):
    monkeypatch.setattr(product, "_CHUNK", chunk)
    _, _, tensors = stored(11, 64, 64, True)
    found = list(product.decoded_rows(*tensors, torch.float32))
    assert [i for rows, _ in found for i in range(11)[rows]] == list(range(11))
    assert len(found) == -(-11 // max(1, chunk // 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 8), (17,), (0,)])
def test_product(tokens, dtype):
    c, s, tensors = stored(37, 192, 64, True)
    W = (torch.tensor(CODEBOOKS[3])[c.long()] * s.repeat_interleave(64, 1)).double()
    x, bias = torch.randn(*tokens, 192).to(dtype), torch.randn(37).to(dtype)
    for b in (None, bias):
        found = product.multiply(x, *tensors, b)
        assert torch.equal(found, product.linear_3bit(x, *tensors, b)), "the operator is the function"
        expected = x.double() @ W.T + (0 if b is None else b.double())
        assert found.dtype == dtype and found.shape == (*tokens, 37)
        limit = 4 * torch.finfo(dtype).eps * (x.double().abs() @ W.abs().T + 4)
        assert ((found.double() - expected).abs() <= limit).all()


def test_layer_calls_the_operator_only_where_somebody_looks(monkeypatch):
    linear = torch.nn.Linear(64, 8)
    module = new_module(linear, 3, StorageSettings())
    fill(module, round_matrix(linear.weight.detach(), 3, StorageSettings(), "linear"))
    assert isinstance(module, Linear3bit)
    called = []
    operator = product.linear_3bit
    monkeypatch.setattr(product, "linear_3bit", lambda *args: called.append(1) or operator(*args))
    module.bias.requires_grad_(False)
    x = torch.randn(2, 64)
    plain = module(x)
    assert not called
    asked = x.clone().requires_grad_()
    module(asked).sum().backward()
    assert len(called) == 1
    torch.testing.assert_close(asked.grad, module.unpack().sum(0).expand(2, 64))
    module.bias.requires_grad_(True)
    with_bias = module(x)
    assert len(called) == 2 and with_bias.requires_grad
    with torch.no_grad():
        assert torch.equal(module(x), plain) and len(called) == 2
