"""Agreement of scores and plans, with scipy's or hand-made rank correlations."""

import re

import pytest
import torch

from hf_cod import LayerAllocation, LayerScores, allocate, compare_plans
from hf_cod.scoring.layer_scores import PartScore


def scores(values, method="owl", parts=(), sizes=None):
    sizes = sizes or [10] * len(values)
    return LayerScores("m", method, values, sizes, granularity="module" if parts else "layer", parts=list(parts))


def by_matrix(method, *values):
    """Two matrices a layer, the first of 6 and the second of 4 weights."""
    parts = [PartScore(i // 2, v, {f"{i // 2}.{'ab'[i % 2]}": 6 - 2 * (i % 2)}) for i, v in enumerate(values)]
    means = [0.6 * a + 0.4 * b for a, b in zip(values[::2], values[1::2], strict=True)]
    return scores(means, method, parts)


def ranked(values):
    return torch.tensor(values).argsort().argsort().double()


def correlation(a, b):
    """Of values without ties: Pearson's of the ranks."""
    return float(torch.corrcoef(torch.stack([ranked(a), ranked(b)]))[0, 1])


def test_agreement_is_the_rank_correlation():
    a, b = [3.0, 1.0, 2.0, 5.0], [0.1, 0.4, 0.3, 0.2]
    plan = allocate(scores(b), "sparsity", 0.5, 0.2)
    found = compare_plans([scores(a), plan], ["a", "b"])
    rows = {row[0]: row[1:] for row in found.rows}
    value = f"{round(correlation(a, b), 3):.4g}"
    assert rows["rank correlation of layers with a"] == ["-", value]
    assert rows["rank correlation of layers with b"] == [value, "-"]
    assert rows["layer that matters most"] == ["3", "1"], "a low sparsity"
    assert rows["layer that matters least"] == ["1", "0"]
    assert rows["mean of the plan"] == ["-", "0.5"]
    assert rows["content"] == ["scores by layer (owl)", "plan of sparsity by layer (owl)"]
    assert not any("matrices" in title or "equal" in title for title in rows)
    assert found.layers[3] == ["3", "5", f"{plan.values[3]:.4g}"]
    assert found.verdict == [f"a and b agree most about the layers: rank correlation {value}."]


def test_matrices_and_equal_values():
    values = [1.0, 6.0, 2.0, 5.0, 3.0, 4.0], [2.0, 1.0, 6.0, 3.0, 5.0, 4.0]
    first, second = (by_matrix(method, *of) for method, of in zip(("x", "y"), values, strict=True))
    rows = {row[0]: row[1:] for row in compare_plans([first, second]).rows}
    assert rows["rank correlation of matrices with x"] == ["-", f"{round(correlation(*values), 3):.4g}"]
    plans = [allocate(one, "bits", 3.5, granularity="module") for one in (first, second)]
    equal = sum(plans[0].modules[name] == plans[1].modules[name] for name in plans[0].modules) / 6
    found = compare_plans([*plans, first], ["p", "q", "x|y"])
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["share of equal values with p"] == ["-", f"{round(equal, 3):.4g}", "-"] and 0 < equal < 1
    assert len(found.verdict) == 2
    page = found.to_markdown()
    assert page.startswith("# compare: p / q / x\\|y\n") and "## Layers" in page
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("|")}
    assert widths == {5}


def test_bad_plans():
    one = scores([1.0, 2.0])
    other = LayerAllocation("bits", 3.5, [3.0, 4.0], [10, 10], "x", sizes=[10, 12], model="n")
    for plans, labels, said in (
        ([one], None, "plans: expected at least two, got 1"),
        ([one, scores([1.0])], None, "plans: expected those of one model, got 2 layers (m) and 1 (m)"),
        ([one, other], None, "plans: expected those of one model, got 10 and 12 weights in layer 1"),
        ([one, one], ["a"], "labels: expected 2, one for each plan, got 1"),
        ([one, "scores.json"], None, "plans: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            compare_plans(plans, labels)
