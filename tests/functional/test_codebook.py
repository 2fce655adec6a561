import pytest
import torch

from hf_cod.functional import codebook
from tests.compression.quantization import references

BLOCK = 8


def matrix(rows=5, columns=24, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def products(columns=24, tokens=40):
    mixed = torch.randn(tokens, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return mixed.mT @ mixed


def test_three_bits_are_every_second_value_of_four():
    assert all(codebook.CODEBOOKS[3][c] == codebook.NF4[2 * c + 1] for c in range(8))
    assert sorted(codebook.NF4) == list(codebook.NF4) and codebook.NF4[7] == 0


@pytest.mark.parametrize("bits", [3, 4])
def test_the_nearest_value(bits):
    W = matrix()
    s = codebook.largest_scales(W, bits, BLOCK)
    torch.testing.assert_close(s, references.largest_scales(W, bits, BLOCK))
    c = codebook.nearest_codes(W, s, bits, BLOCK)
    expected = [[references.nearest(float(W[i, j] / s[i, j // BLOCK]), bits) for j in range(24)] for i in range(5)]
    assert c.dtype == torch.uint8 and c.tolist() == expected
    Q = codebook.decode(c, s, bits, BLOCK)
    for i, j in ((0, 0), (4, 23), (2, 11)):
        assert Q[i, j] == codebook.CODEBOOKS[bits][c[i, j]] * s[i, j // BLOCK]


@pytest.mark.parametrize("bits", [3, 4])
def test_the_largest_weight_of_a_block_is_kept(bits):
    W = matrix()
    s = codebook.largest_scales(W, bits, BLOCK)
    Q = codebook.decode(codebook.nearest_codes(W, s, bits, BLOCK), s, bits, BLOCK)
    extremes = W.view(5, 3, BLOCK).abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(Q.view(5, 3, BLOCK).gather(-1, extremes), W.view(5, 3, BLOCK).gather(-1, extremes))


@pytest.mark.parametrize("bits", [3, 4])
def test_searched_scales_have_the_least_cost(bits, monkeypatch):
    monkeypatch.setattr(codebook, "CHUNK", 48)  # two rows at a time
    W, w = matrix(), torch.rand(24, dtype=torch.float64) ** 4
    s = codebook.search_scales(W, bits, BLOCK, w)
    for i, b, values in references.block_of(W, BLOCK):
        weights = w[b * BLOCK : (b + 1) * BLOCK].tolist()
        found = references.cost(values, float(s[i, b]), bits, weights)
        assert found == pytest.approx(references.least_cost(values, bits, weights), rel=1e-9)


@pytest.mark.parametrize("bits", [3, 4])
def test_compensation_is_the_optimal_brain_quantizer(bits, monkeypatch):
    monkeypatch.setattr(codebook, "COLUMNS", 10)  # errors cross the borders of runs of columns
    W, H = matrix(), products()
    s = codebook.search_scales(W, bits, BLOCK, H.diagonal())
    c = codebook.compensated_codes(W, s, H, bits, BLOCK, damping=0.01)
    Q = codebook.decode(c, s, bits, BLOCK)
    torch.testing.assert_close(Q, references.compensated(W, s, H, bits, BLOCK, 0.01))
    nearest = codebook.decode(codebook.nearest_codes(W, s, bits, BLOCK), s, bits, BLOCK)
    lost = [float((((W - M) @ H) * (W - M)).sum()) for M in (Q, nearest)]
    assert lost[0] < 0.8 * lost[1]


def test_uncorrelated_channels_leave_nothing_to_make_up_for():
    W, H = matrix(), torch.diag(torch.rand(24, dtype=torch.float64) + 0.1)
    s = codebook.largest_scales(W, 3, BLOCK)
    found = codebook.compensated_codes(W, s, H, 3, BLOCK)
    assert torch.equal(found, codebook.nearest_codes(W, s, 3, BLOCK))


@pytest.mark.parametrize("bits", [3, 4])
def test_blocks_of_zeros_and_channels_that_nothing_enters(bits):
    W, H = matrix(), products()
    W[:, BLOCK : 2 * BLOCK] = 0
    H[3], H[:, 3] = 0, 0
    s = codebook.search_scales(W, bits, BLOCK, H.diagonal())
    for c in (codebook.nearest_codes(W, s, bits, BLOCK), codebook.compensated_codes(W, s, H, bits, BLOCK)):
        Q = codebook.decode(c, s, bits, BLOCK)
        assert Q.isfinite().all() and not Q[:, BLOCK : 2 * BLOCK].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_uniform_grid(bits):
    """The largest magnitude is the lowest integer; values are nearest, and clipped where the grid ends."""
    W, half = matrix(), 1 << (bits - 1)
    C = codebook.codebook(bits, W, uniform=True)
    assert C.tolist() == [q / half for q in range(-half, half)]
    s = codebook.largest_scales(W, bits, BLOCK, uniform=True)
    c = codebook.nearest_codes(W, s, bits, BLOCK, uniform=True)
    for i in range(5):
        for j in range(24):
            block = W[i, j // BLOCK * BLOCK :][:BLOCK].tolist()
            scale = -max(block, key=abs)
            assert s[i, j // BLOCK] == scale
            distances = [abs(q / half * scale - float(W[i, j])) for q in range(-half, half)]
            assert distances[int(c[i, j])] == min(distances)
    assert torch.equal(codebook.decode(c, s, bits, BLOCK, uniform=True), C[c.long()] * s.repeat_interleave(BLOCK, 1))


@pytest.mark.parametrize("bits", [3, 4])
def test_searched_scales_and_compensation_on_the_uniform_grid(bits):
    W, H = matrix(), products()
    w, half = H.diagonal(), 1 << (bits - 1)
    s = codebook.search_scales(W, bits, BLOCK, w, uniform=True)
    for i, b, values in references.block_of(W, BLOCK):
        largest, weights = max(values, key=abs), w[b * BLOCK : (b + 1) * BLOCK].tolist()

        def cost(scale, values=values, weights=weights):
            near = [min((q / half * scale for q in range(-half, half)), key=lambda v: abs(v - x)) for x in values]
            return sum(u * (x - v) ** 2 for u, x, v in zip(weights, values, near, strict=True))

        tried = [cost(sign * share * largest) for share in codebook.TRIED_UNIFORM for sign in (1, -1)]
        assert cost(float(s[i, b])) == pytest.approx(min(tried), rel=1e-9)
    plain = codebook.decode(codebook.nearest_codes(W, s, bits, BLOCK, uniform=True), s, bits, BLOCK, uniform=True)
    codes = codebook.compensated_codes(W, s, H, bits, BLOCK, uniform=True)
    compensated = codebook.decode(codes, s, bits, BLOCK, uniform=True)
    losses = [float((((W - Q) @ H) * (W - Q)).sum()) for Q in (plain, compensated)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_coordinate_descent(bits, uniform, monkeypatch):
    """Column by column, each rounded with all others fixed, as one would write it down."""
    monkeypatch.setattr(codebook, "COLUMNS", 10)
    W, H = matrix(), products()
    s = codebook.search_scales(W, bits, BLOCK, H.diagonal(), uniform=uniform)
    c = codebook.compensated_codes(W, s, H, bits, BLOCK, uniform=uniform)
    found = codebook.descended_codes(W, c, s, H, bits, BLOCK, uniform=uniform)
    C = codebook.codebook(bits, W, uniform)
    damped = H + torch.eye(24) * codebook.DAMPING * H.diagonal().mean()
    expected = c.clone()
    error = lambda codes, i: (W[i] - C[codes[i].long()] * s[i].repeat_interleave(BLOCK)) @ damped  # noqa: E731
    for i in range(5):
        for j in range(24):
            target = C[int(expected[i, j])] * s[i, j // BLOCK] + error(expected, i)[j] / damped[j, j]
            expected[i, j] = int((C * s[i, j // BLOCK] - target).abs().argmin())
    assert torch.equal(found, expected) and not torch.equal(found, c)
    losses = []
    for codes in (c, found):
        D = W - codebook.decode(codes, s, bits, BLOCK, uniform=uniform)
        losses.append(float(((D @ damped) * D).sum()))
    assert losses[1] < losses[0]
