import pytest
import torch

from hf_cod.compression.sparse.format import check, pack, unpack
from tests.compression.sparse.matrices import SHAPES, matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, sparsity, dtype):
    W = matrix(*shape, sparsity, dtype)
    mask, values, row_starts = pack(W)
    check(mask, values, row_starts, shape[1], "W")
    back = unpack(mask, values, shape[1])
    assert back.dtype == dtype and torch.equal(back, W)
    assert mask.shape == (shape[0], -(-shape[1] // 8)) and len(values) == W.count_nonzero() == row_starts[-1]


def test_the_layout_is_the_documented_one():
    W = torch.zeros(2, 11)
    W[0, 0], W[0, 10], W[1, 9] = 1.0, 2.0, 3.0
    mask, values, row_starts = pack(W)
    assert mask.tolist() == [[1, 4], [0, 2]]
    assert values.tolist() == [1.0, 2.0, 3.0] and row_starts.tolist() == [0, 2, 3]


def test_many_rows_and_empty_ones():
    W = torch.zeros(5000, 1001)
    W[4321, 1000] = W[7, 0] = 1.0
    mask, values, row_starts = pack(W)
    assert len(values) == 2 and torch.equal(unpack(mask, values, 1001), W)
    check(mask, values, row_starts, 1001, "W")


def test_special_values_come_back_bit_by_bit_and_negative_zero_as_zero():
    tiny = torch.finfo(torch.float32).smallest_normal / 2
    W = torch.tensor([[-0.0, 0.0, tiny, -tiny, float("inf"), float("nan"), -1.0]])
    mask, values, _ = pack(W)
    assert len(values) == 5, "pruning by a product leaves negative zeros, which must not be stored"
    back = unpack(mask, values, 7).view(torch.int32)
    assert back[0, 0] == 0 and torch.equal(back[0, 1:], W.view(torch.int32)[0, 1:])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda mask, values, starts: (mask, values[:-1], starts), "values as the mask counts, got"),
        (lambda mask, values, starts: (mask[:, :-1], values, starts), r"a mask \(rows, 2\)"),
        (lambda mask, values, starts: (mask.int(), values, starts), "of uint8"),
        (lambda mask, values, starts: (mask, values, starts[:-1]), r"row_starts \(4,\)"),
        (lambda mask, values, starts: (mask, values, starts + (torch.arange(4) == 2)), r"row_starts\[2\] = "),
        (lambda mask, values, starts: (mask ^ 1, values, starts), r"row_starts\[1\] = "),
        (lambda mask, values, starts: (mask | 128, values, starts), "no bits after column 10"),
    ],
)
def test_tensors_that_do_not_belong_together(change, message):
    tensors = pack(torch.ones(3, 11))
    with pytest.raises(ValueError, match=f"layer: expected .*{message}"):
        check(*change(*tensors), 11, "layer")
