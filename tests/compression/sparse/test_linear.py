import pytest
import torch
from torch import nn

from hf_cod import SparseLinear
from hf_cod.compression.sparse.format import pack
from hf_cod.compression.sparse.kernel import load_kernel
from tests.compression.sparse.matrices import SHAPES, matrix

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [*range(1, 18), 40]


def close(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> None:
    """y = x W^T + b as float64 has it: up to the dtype's rounding of the result and fp32's of the sum."""
    x, W = x.double(), W.double()
    exact, size = x @ W.mT, x.abs() @ W.abs().mT
    if b is not None:
        exact, size = exact + b.double(), size + b.double().abs()
    rounding = torch.finfo(y.dtype).eps
    assert (y.double() - exact).abs().le(rounding * exact.abs() + 1e-6 * size + 1e-30).all()


def linear(shape, sparsity, dtype, bias=True) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias, dtype=dtype)
    layer.weight.data = matrix(*shape, sparsity, dtype)
    return layer


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_equal_to_the_dense_product(sparsity, dtype, threads):
    for shape in SHAPES:
        layer = linear(shape, sparsity, dtype)
        packed = SparseLinear.from_linear(layer)
        assert packed.sparsity == pytest.approx(1 - layer.weight.count_nonzero() / layer.weight.numel())
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1]).to(dtype)
            with torch.no_grad():
                y = packed(x)
            assert y.dtype == dtype and y.shape == (tokens, shape[0])
            close(y, x, layer.weight, layer.bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_of_the_kernel_gives_the_same(dtype, threads):
    """Each set of instructions that this machine has, and plain C++."""
    kernel = load_kernel()
    assert kernel is not None, "the tests need a C++ compiler"
    assert kernel.instructions(dtype)[-1] == "portable"
    for shape in SHAPES:
        W = matrix(*shape, 0.7, dtype)
        packed, b = pack(W), torch.randn(shape[0]).to(dtype)
        assert torch.equal(kernel.rows(*packed, shape[1], 0, shape[0]), W)
        assert torch.equal(kernel.rows(*packed, shape[1], shape[0] // 2, shape[0]), W[shape[0] // 2 :])
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1]).to(dtype)
            for instructions in kernel.instructions(dtype):
                close(kernel.product(x, *packed, b, instructions), x, W, b)
                close(kernel.product(x, *packed, None, instructions), x, W)


def test_a_large_matrix_with_threads_that_share_it(threads):
    W = matrix(1100, 2051, 0.7, torch.bfloat16)
    W[17] = W[1099] = 0  # empty rows, one of them the last
    layer = linear((1100, 2051), 0.0, torch.bfloat16)
    layer.weight.data = W
    packed = SparseLinear.from_linear(layer)
    for tokens in (1, 16, 64):
        x = torch.randn(tokens, 2051).bfloat16()
        close(packed(x), x, W, layer.bias)


def test_what_the_kernel_refuses():
    kernel = load_kernel()
    packed, x = pack(matrix(9, 33, 0.5)), torch.randn(2, 33)
    for wrong, message in [
        ((x.bfloat16(), *packed, None, None), "expected 2-D and of the values' dtype"),
        ((x[:, :20], *packed, None, None), "as many columns"),
        ((x, packed[0], packed[1][:-1], packed[2], None, None), "row_starts: expected 0 ... len"),
        ((x, *packed, torch.zeros(8), None), "bias: expected"),
        ((x.half(), packed[0], packed[1].half(), packed[2], None, None), "expected float32 or bfloat16"),
        ((x, *packed, None, "neon"), "instructions: expected one of .*portable.*, got neon"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernel.product(*wrong)
    with pytest.raises(RuntimeError, match="0 <= first <= last <= rows"):
        kernel.rows(*packed, 33, 0, 10)


def test_shapes_of_the_input():
    layer = linear((37, 65), 0.7, torch.float32)
    packed = SparseLinear.from_linear(layer)
    for x in (
        torch.randn(65),
        torch.randn(2, 3, 65),
        torch.randn(0, 65),
        torch.randn(65, 6).mT,
        torch.randn(2, 60, 65),
    ):
        torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"input: expected \(..., 65\), got \(2, 66\)"):
        packed(torch.randn(2, 66))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_computed_densely(dtype):
    layer = linear((37, 65), 0.7, dtype)
    packed = SparseLinear.from_linear(layer)
    x = torch.randn(3, 65, dtype=dtype)
    torch.testing.assert_close(packed(x), layer(x))


def test_non_finite_inputs_spread_as_in_the_dense_product():
    W = matrix(9, 33, 0.7)
    x = torch.randn(1, 33)
    x[0, 4] = float("inf")
    packed = SparseLinear.from_linear(linear((9, 33), 0.7, torch.float32, bias=False))
    assert torch.equal(packed(x).isnan(), (x @ W.mT).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 40])
def test_gradients_reach_the_input_and_the_bias(tokens, dtype):
    layer = linear((70, 2051), 0.7, dtype)
    packed = SparseLinear.from_linear(linear((70, 2051), 0.7, dtype))
    packed.bias.data.copy_(layer.bias)
    x, g = torch.randn(2, tokens, 2051).to(dtype), torch.randn(2, tokens, 70).to(dtype)
    found = []
    for module in (layer, packed):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(g)
        found.append((leaf.grad, module.bias.grad))
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compile_sees_one_operator():
    layer = linear((37, 65), 0.7, torch.float32)
    packed = SparseLinear.from_linear(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend=backend)
    x = torch.randn(3, 65)
    torch.testing.assert_close(compiled(x), layer(x).relu(), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1 and "hf_cod.sparse_linear" in graphs[0].code
    arguments = (x.requires_grad_(), packed.mask, packed.values, packed.row_starts, packed.bias)
    torch.library.opcheck(torch.ops.hf_cod.sparse_linear.default, arguments)
    torch.library.opcheck(
        torch.ops.hf_cod.sparse_linear_backward.default,
        (torch.randn(3, 37), packed.mask, packed.values, packed.row_starts, 65),
    )


def test_inductor_trains_through_it():
    layer, x = linear((37, 65), 0.7, torch.float32), torch.randn(3, 65)
    packed = SparseLinear.from_linear(layer)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(packed, fullgraph=True)(one).square().sum().backward()
    layer(two).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)


def test_autocast_takes_what_comes():
    packed = SparseLinear.from_linear(linear((37, 65), 0.7, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 65).bfloat16()).dtype == torch.float32


def test_the_weight_can_be_read_and_not_written():
    layer = linear((37, 65), 0.7, torch.float32)
    packed = SparseLinear.from_linear(layer)
    assert torch.equal(packed.weight, layer.weight) and type(packed.weight + 0) is torch.Tensor
    assert torch.equal(packed.to_linear().weight, layer.weight)
    with pytest.raises(ValueError, match=r"weight: expected no change .* model.dequantize\(\)"):
        packed.weight.data += 1
    with pytest.raises(ValueError, match="weight: expected no change"):
        packed.weight.data = torch.zeros(37, 65)


def test_the_tensors_are_checked_when_they_are_loaded():
    layers = nn.Sequential(SparseLinear.from_linear(linear((9, 33), 0.5, torch.float32)))
    state = layers.state_dict()
    layers.load_state_dict(state)
    with pytest.raises(ValueError, match=r"0: expected row_starts\[1\]"):
        layers.load_state_dict({**state, "0.mask": state["0.mask"] ^ 1})
