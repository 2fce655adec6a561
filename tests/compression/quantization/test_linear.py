import copy
import pickle

import pytest
import torch
from torch import nn

from hf_cod.compression.quantization.rounding import round_matrix
from hf_cod.compression.quantization.settings import StorageSettings
from tests.compression.quantization.matrices import SHAPES, naive, quantized

BITS = [3, 4]


def both(module, x):
    """The module's output and gradient of x, and those of a dense layer with the same weights."""
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None).to(x.dtype)
    dense.weight = nn.Parameter(naive(module).to(x.dtype))
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().clone())
    found = []
    for layer in (module, dense):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
        found.append((out.detach(), leaf.grad, *([] if layer.bias is None else [layer.bias.grad])))
        layer.zero_grad()
    return found


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_computes_what_its_matrix_says(shape, bits, double_quant):
    module = quantized(shape, bits, double_quant=double_quant)
    torch.testing.assert_close(module.unpack(), naive(module), rtol=0, atol=0)
    for tokens in ((2, 3), (1,), (1, 1), *([()] if bits == 3 else [])):
        mine, dense = both(module, torch.randn(*tokens, shape[1]))
        for found, expected in zip(mine, dense, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        one = torch.randn(1, shape[1])
        torch.testing.assert_close(module(one), module(one.expand(2, -1))[:1], atol=1e-5, rtol=1e-5)
        assert module(torch.randn(0, shape[1])).shape == (0, shape[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_blocks_of_every_size(block, bits):
    module = quantized((9, 256), bits, block=block)
    torch.testing.assert_close(module.unpack(), naive(module), rtol=0, atol=0)
    assert len(module.scales.absmax) == 9 * 256 // block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_dtypes(bits, dtype):
    module = quantized((33, 128), bits, dtype=dtype)
    mine, dense = both(module, torch.randn(5, 128).to(dtype))
    for found, expected in zip(mine, dense, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("bits", BITS)
def test_compute_dtype_and_autocast(bits):
    x = torch.randn(5, 128)
    module = quantized((33, 128), bits, compute_dtype=torch.bfloat16)
    plain = quantized((33, 128), bits, bias=False)
    dense = (x.bfloat16() @ module.unpack(torch.bfloat16).mT + module.bias.bfloat16()).float()
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), dense, atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            plain(x), (x.bfloat16() @ plain.unpack(torch.bfloat16).mT).float(), atol=2e-2, rtol=2e-2
        )


@pytest.mark.parametrize("bits", BITS)
def test_casting_leaves_codes_and_scales_exact(bits):
    module = quantized((9, 128), bits, double_quant=False)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for cast in (lambda: module.bfloat16(), lambda: module.half(), lambda: module.to(torch.float64)):
        cast()
        after = module.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before if key != "bias")
    assert module.bias.dtype == torch.float64


@pytest.mark.parametrize("bits", BITS)
def test_float16_near_its_largest_value(bits):
    W = torch.full((2, 64), 60000.0, dtype=torch.float16)
    W[1] = torch.linspace(-60000, 60000, 64)
    module = quantized((2, 64), bits, double_quant=False)
    from hf_cod.compression.quantization.rounding import fill

    fill(module, round_matrix(W, bits, StorageSettings(double_quant=False), "linear"))
    assert module.unpack(torch.float16).isfinite().all()
    assert torch.equal(module.unpack(torch.float16)[0], W[0])
    W = torch.full((2, 256), 65504.0, dtype=torch.float16)
    W[0, :64], W[1, :64] = 1.0, 65000.0  # the stored scales are a little above
    try:
        tensors = round_matrix(W, bits, StorageSettings(), "linear")
    except ValueError as error:
        assert str(error).startswith("weights: expected scales within the model's dtype")
    else:
        module = quantized((2, 256), bits)
        fill(module, tensors)
        assert module.unpack(torch.float16).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_copies(bits):
    module = quantized((9, 70), bits)
    x = torch.randn(3, 70)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert type(other._parameters["weight"]) is type(module._parameters["weight"])
        assert other.weight.data_ptr() != module.weight.data_ptr()
        assert all(torch.equal(t, module.state_dict()[k]) for k, t in other.state_dict().items())
        other.scales.absmax.data.zero_()
        assert module.scales.absmax.any()


@pytest.mark.parametrize("bits", BITS)
def test_a_state_dict_is_loaded(bits):
    one, two = quantized((9, 70), bits), quantized((9, 70), bits)
    x = torch.randn(3, 70)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x)) and torch.equal(one.unpack(), two.unpack())


@pytest.mark.parametrize("bits", BITS)
def test_inputs_of_another_width(bits):
    module = quantized((9, 70), bits)
    for width in (64, 69, 71, 128):
        with pytest.raises(ValueError, match=rf"input: expected \(\.\.\., 70\), got \(2, {width}\)"):
            module(torch.randn(2, width))


def operands(module, x):
    return (x, module.weight.detach(), *module.scales(), module.block, module.bias)


def test_the_operator_keeps_its_contract():
    module = quantized((9, 128), 3)
    torch.library.opcheck(torch.ops.hf_cod.linear_3bit.default, operands(module, torch.randn(3, 128).requires_grad_()))
    arguments = operands(module, torch.randn(2, 3, 9))[:-1]
    torch.library.opcheck(torch.ops.hf_cod.linear_3bit_backward.default, arguments)


def test_gradients_by_differences():
    module = quantized((5, 64), 3, dtype=torch.float64)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(module, (x,))
    bias = module.bias.detach().clone().requires_grad_()
    torch.autograd.gradcheck(lambda b: torch.ops.hf_cod.linear_3bit(*operands(module, x.detach())[:-1], b), (bias,))


def test_rows_come_in_chunks(monkeypatch):
    from hf_cod.compression.quantization import product

    module, x = quantized((9, 128), 3), torch.randn(3, 128)
    whole = both(module, x)[0]
    monkeypatch.setattr(product, "_CHUNK", 256)  # two rows at a time, and one left
    for found, expected in zip(both(module, x)[0], whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.unpack(), naive(module), rtol=0, atol=0)


def test_compile_sees_one_operator():
    module, graphs = quantized((9, 70), 3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(3, 70)
    compiled = torch.compile(nn.Sequential(module, nn.ReLU()), fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), module(x).relu())
    assert len(graphs) == 1 and "hf_cod.linear_3bit" in graphs[0].code


def test_inductor_trains_through_it():
    module = quantized((9, 70), 3)
    one = torch.randn(3, 70).requires_grad_()
    two = one.detach().clone().requires_grad_()
    torch.compile(module, fullgraph=True, dynamic=False)(one).square().sum().backward()
    module(two).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)


def test_codes_are_no_numbers():
    module = quantized((9, 64), 3)
    for attempt in (
        lambda: module.weight + torch.ones(9, 64),
        lambda: module.weight.data.__iadd__(torch.ones(9, 64)),
        lambda: module.weight.data.clone().__iadd__(torch.ones(9, 64, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError, match=r"weight: expected no arithmetic .* model.dequantize\(\)"):
            attempt()
    with pytest.raises(ValueError, match="weight: expected no arithmetic"):
        module.weight.data = torch.zeros(9, 64)
    (planes,) = (p for name, p in module.named_parameters() if name == "weight")
    assert type(planes) is nn.Parameter and not planes.requires_grad and torch.equal(planes, module.weight)
