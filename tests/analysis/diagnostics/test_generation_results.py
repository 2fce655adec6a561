"""Intervals and rank correlations of readings, against bootstraps by hand."""

import pytest
import torch
from scipy.stats import spearmanr

from hf_cod.analysis.diagnostics.generation_drop import GenerationDrop
from hf_cod.analysis.diagnostics.generation_results import generation_figures, generation_summary

S, L = 12, 6


@pytest.fixture
def sweep():
    def drawn(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(3)
    scores = drawn(S, L + 1).round()
    scores[6:, 2] = torch.nan  # stopped early
    tokens = torch.randint(1, 5, (2, S), generator=generator).double()
    losses = drawn(2, S, L + 1) * 3
    return GenerationDrop(
        tasks=["a", "b"],
        places=[0, 1] * (S // 2),
        scores=scores,
        reference=losses[0],
        reference_tokens=tokens[0],
        chain=losses[1],
        chain_tokens=tokens[1],
        answers=["yes"] * S,
        looks=3,
    )


def changes_by_hand(sweep, rows):
    """The three changes by layer for a choice of prompts."""
    found = []
    scores = sweep.scores.tolist()
    for losses, tokens in ((sweep.reference, sweep.reference_tokens), (sweep.chain, sweep.chain_tokens)):
        losses, tokens = losses.tolist(), tokens.tolist()
        means = [sum(losses[i][c] for i in rows) / sum(tokens[i] for i in rows) for c in range(L + 1)]
        found.append([float(m - means[0]) for m in means[1:]])
    by_layer = []
    for c in range(1, L + 1):
        # A resample without any answered prompt has the value of all prompts.
        asked = [i for i in rows if scores[i][c] == scores[i][c]]
        asked = asked or [i for i in range(S) if scores[i][c] == scores[i][c]]
        by_layer.append(float(sum(scores[i][c] - scores[i][0] for i in asked) / len(asked)))
    return [*found, by_layer]


def test_changes_and_paired_intervals(sweep):
    layers, results, ends = generation_figures(sweep, 5)
    names = ["reference_loss", "chain_loss", "task_accuracy"]
    for name, by_hand in zip(names, changes_by_hand(sweep, range(S)), strict=True):
        assert layers[name] == pytest.approx(by_hand)
    draws = torch.randint(S, (1000, S), generator=torch.Generator().manual_seed(5))
    drawn = torch.tensor([changes_by_hand(sweep, rows) for rows in draws.tolist()], dtype=torch.float64)  # (D, 3, L)
    both = torch.tensor([0.025, 0.975], dtype=torch.float64)
    naive = drawn.quantile(both, dim=0)  # (2, 3, L)
    for place, name in enumerate(names):
        assert torch.allclose(torch.tensor(ends[name], dtype=torch.float64), naive[:, place].T)
    for told, (a, b) in zip(results["rank_correlations"], [(0, 1), (0, 2), (1, 2)], strict=True):
        sign = -1 if b == 2 else 1
        assert told["readings"] == [names[a], names[b]]
        assert told["value"] == pytest.approx(
            spearmanr(*(torch.tensor(layers[names[i]]).round(decimals=9) for i in (a, b))).statistic * sign
        )
        each = torch.tensor(
            [spearmanr(d[a], d[b]).statistic * sign for d in drawn.round(decimals=9).tolist()], dtype=torch.float64
        )
        assert [told["low"], told["high"]] == pytest.approx(each.quantile(both).tolist())
    assert results["prompts_by_layer"] == [S, 6, S, S, S, S]


def test_readings_of_each_task(sweep):
    found = generation_figures(sweep, 0)[1]["tasks"]["b"]
    assert found["prompts"] == S // 2
    assert found["intact"]["task_accuracy"] == pytest.approx(float(sweep.scores[1::2, 0].mean()))
    asked = sweep.scores[1::2, 2]
    assert found["without"]["task_accuracy"][1] == pytest.approx(float(asked[~asked.isnan()].mean()))


def test_a_summary_names_the_worst_layer(sweep):
    layers, results, _ = generation_figures(sweep, 0)
    worst = min(range(L), key=lambda i: layers["task_accuracy"][i])
    assert f"without layer {worst} " in generation_summary(results, layers)[0]
    assert len(generation_summary(results, layers)) == 4
