import pytest
import torch

from hf_cod.compression.export.uniform import PACKED, SCALE, SHAPE, decode, pack, round_uniform, unpack
from hf_cod.functional import codebook


def bits_by_hand(codes, bits):
    """One row as a string of bits, the lowest one first, cut into words."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    words = [stream[i : i + 32].ljust(32, "0") for i in range(0, len(stream), 32)]
    return [int(word[::-1], 2) - (1 << 32 if word[31] == "1" else 0) for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packing(bits):
    c = torch.randint(0, 1 << bits, (3, 40), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(c, bits)
    assert packed.tolist() == [bits_by_hand(row, bits) for row in c.tolist()]
    assert torch.equal(unpack(packed, bits, 40), c)


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_of_the_package(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    c = torch.randint(0, 1 << bits, (4, 96), dtype=torch.uint8)
    signed = (c.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(c, bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_nearest_values_of_the_grid(bits, dtype):
    """Without anything else the largest magnitude of a group is the lowest integer, and all others are nearest."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 96, generator=generator).to(dtype)
    tensors, rounding = round_uniform(W, bits, 32, "W"), 2 * torch.finfo(dtype).eps
    Q, half = decode(tensors, bits, 32), 1 << (bits - 1)
    assert tensors[PACKED].dtype == torch.int32 and tensors[SCALE].dtype == Q.dtype == dtype
    assert tensors[SHAPE].tolist() == [5, 96]
    for row in range(5):
        for start in range(0, 96, 32):
            w = W[row, start : start + 32]
            largest = w[w.abs().argmax()]
            s = -(largest.float() / half).to(dtype)
            assert tensors[SCALE][row, start // 32] == s
            for w_j, q_j in zip(w, Q[row, start : start + 32], strict=True):
                near = min((q * s for q in range(-half, half)), key=lambda v: abs(float(v) - float(w_j)))
                assert abs(float(q_j) - float(w_j)) <= abs(float(near) - float(w_j)) + rounding * abs(float(w_j))


@pytest.mark.parametrize("bits", [3, 4])
def test_squares_lower_the_weighted_error_and_compensation_that_of_the_outputs(bits):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 64, generator=generator)
    X = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    H = X.T @ X
    plain, weighted, compensated = (
        decode(round_uniform(W, bits, 32, "W", **given), bits, 32)
        for given in ({}, {"squares": H.diagonal()}, {"products": H})
    )
    costs = [((W - Q).square() * H.diagonal()).sum() for Q in (plain, weighted)]
    assert costs[1] < costs[0]
    losses = [(X @ (W - Q).T).square().sum() for Q in (plain, weighted, compensated)]
    assert losses[2] < 0.7 * losses[1] and losses[2] < 0.7 * losses[0]


def test_a_group_of_zeros_and_numbers_that_are_none():
    W = torch.zeros(2, 64)
    W[0, 3] = 1
    assert torch.equal(decode(round_uniform(W, 3, 32, "W"), 3, 32), W)
    with pytest.raises(ValueError, match=r"^weights: expected finite numbers, got NaN or infinity in some\.name$"):
        round_uniform(W.fill_(torch.inf), 3, 32, "some.name")


@pytest.mark.parametrize("bits, least, most", [(3, 1.12, 1.24), (4, 1.18, 1.32)])
def test_what_the_grid_costs_at_equal_stored_bits(bits, least, most):
    """On normal weights: groups of 128 with scales of 16 bits, against the codebook, groups of 64 with scales of 8."""
    W = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    tensors = round_uniform(W, bits, 128, "W", squares=torch.ones(1024))
    grid, book = decode(tensors, bits, 128), codebook.rounded(W, bits, torch.ones(1024), 64)
    assert least < float((grid - W).square().sum() / (book - W).square().sum()) < most
