import pytest
import torch

from hf_cod.functional.linear_map import MapSums, fold


def rows(tokens=40, d=6):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    M = draw(tokens, d)
    return M, M @ draw(d, d) + 0.3 * draw(tokens, d)


def sums_of(M, R):
    sums = MapSums()
    for m, r in zip(M.split(7), R.split(7), strict=True):
        sums.add(m, r)
    return sums


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_map_against_least_squares_on_stacked_rows(damping):
    M, R = rows()
    lam = damping * (M.T @ M).diagonal().mean()
    eye = torch.eye(6, dtype=M.dtype)
    D = torch.linalg.lstsq(torch.cat([M, lam.sqrt() * eye]), torch.cat([R, 0 * eye])).solution
    T, explained = sums_of(M, R).solve(damping)
    torch.testing.assert_close(T, D + eye)
    assert explained == pytest.approx(1 - float((M @ D - R).square().sum() / R.square().sum()))


def test_damping_draws_to_the_plain_removal():
    M, R = rows()
    T, explained = sums_of(M, R).solve(1e9)
    torch.testing.assert_close(T, torch.eye(6, dtype=M.dtype), atol=1e-7, rtol=0)
    assert explained == pytest.approx(0, abs=1e-7)


def test_more_channels_than_tokens_and_nothing_to_explain():
    M, R = rows(tokens=3)
    T, explained = sums_of(M, R).solve()
    assert T.isfinite().all() and 0 < explained < 1
    T, explained = sums_of(M, 0 * R).solve()
    torch.testing.assert_close(T, torch.eye(6, dtype=M.dtype))
    assert explained == 0
    T, explained = sums_of(0 * M, R).solve()
    torch.testing.assert_close(T, torch.eye(6, dtype=M.dtype))
    assert explained == 0


def test_folded_is_the_output_times_the_map():
    generator = torch.Generator().manual_seed(1)
    W, b, a = (torch.randn(*shape, generator=generator) for shape in ((4, 7), (4,), (5, 7)))
    T = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.linear(a, W, b).double() @ T
    found = torch.nn.functional.linear(a.double(), fold(W, T), fold(b[:, None], T)[:, 0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
