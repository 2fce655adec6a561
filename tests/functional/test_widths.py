"""Shares become whole heads and multiples of channels, and their sum stays the budget."""

import random

import pytest

from hf_cod.functional.widths import Layer, Widths, choose_widths

SMOLLM2 = Layer(Widths(3, 1536), 294_912, 1728)


def test_heads_keep_the_share_and_channels_what_is_left_of_it():
    (found,) = choose_widths([SMOLLM2], [0.8], 32)
    assert found == Widths(2, 1312)  # 0.8 x 3,538,944 - 2 x 294,912 = 1297.1 channels, nearer to 1312 than to 1280
    assert choose_widths([SMOLLM2], [1.0], 32) == [SMOLLM2.full]
    assert choose_widths([SMOLLM2], [0.0], 32) == [Widths(1, 32)]


def test_layers_that_are_alike_stay_alike_and_others_meet_the_sum():
    assert len(set(choose_widths([SMOLLM2] * 30, [0.77] * 30, 32))) == 1
    for seed in range(20):
        draw = random.Random(seed)
        shares = [draw.uniform(0.4, 0.9) for _ in range(30)]
        found = choose_widths([SMOLLM2] * 30, shares, 32)
        wanted = sum(shares) * SMOLLM2.count(SMOLLM2.full)
        assert abs(sum(map(SMOLLM2.count, found)) - wanted) <= 32 * SMOLLM2.b / 2
        for widths, share in zip(found, shares, strict=True):
            assert widths.channels % 32 == 0 and abs(widths.heads - 3 * share) < 1
            assert abs(SMOLLM2.count(widths) - share * SMOLLM2.count(SMOLLM2.full)) <= 32 * SMOLLM2.b * 1.001


def test_all_channels_may_be_no_multiple():
    layer = Layer(Widths(0, 50), 0, 10)
    shares = [0.1, 0.5, 0.9, 0.99, 1.0]
    assert [choose_widths([layer], [share], 16)[0].channels for share in shares] == [16, 32, 48, 50, 50]
    assert choose_widths([layer], [0.3], 64) == [Widths(0, 50)]


def test_a_layer_of_heads_alone():
    layer = Layer(Widths(8, 0), 10, 0)
    assert [choose_widths([layer], [share], 32)[0].heads for share in (0.01, 0.3, 0.5, 0.95)] == [1, 2, 4, 8]


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_the_other_head_count_where_only_it_meets_the_share(heads):
    """Few channels beside heavy heads: rounding heads to the nearest would leave a gap that no channel could fill."""
    layer = Layer(Widths(heads, 64), 1000, 10)
    for share in (0.3, 0.5, 0.7, 0.9):
        (found,) = choose_widths([layer], [share], 16)
        best = min(
            abs(layer.count(Widths(h, c)) - share * layer.count(layer.full))
            for h in range(1, heads + 1)
            for c in (16, 32, 48, 64)
        )
        off = abs(layer.count(found) - share * layer.count(layer.full))
        assert off <= max(best, 16 * layer.b / 2) + 1e-6


def test_a_head_is_removed_where_a_multiple_of_the_channels_of_experts_would_be_too_much():
    layer = Layer(Widths(2, 0, 16), 1536, 0, 384, step=8)
    assert choose_widths([layer], [0.85], 8) == [Widths(1, 0, 16)]  # 7680 weights of 7834
    assert choose_widths([layer], [0.5], 8) == [Widths(1, 0, 8)]
    assert choose_widths([layer], [1.0], 8) == [layer.full]
