import torch

from hf_cod.functional.randomness import generator_of
from hf_cod.functional.rounding import round_stochastically


def test_the_mean_is_exact_and_both_neighbours_are_met():
    for x in (1.0 + 0.3 / 128, -1.0 - 0.3 / 128, 3e-39, -0.7):
        rounded = round_stochastically(torch.full((200_000,), x), generator_of(0)).double()
        step = 2.0 ** (torch.tensor(abs(x)).log2().floor().item() - 7) if abs(x) > 1e-38 else 2.0**-133
        assert (rounded - x).abs().max() < step
        assert abs(rounded.mean() - x) < 5 * step / 200_000**0.5
    assert len(round_stochastically(torch.full((1000,), 1.0 + 0.3 / 128), generator_of(0)).unique()) == 2


def test_what_bfloat16_holds_stays_as_it_is():
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(x.float(), generator_of(1)), x)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = round_stochastically(special, generator_of(1))
    assert torch.equal(rounded[:2].float(), special[:2]) and rounded[2].isnan() and (rounded[3:] == 0).all()
