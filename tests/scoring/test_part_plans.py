"""Scores and plans of blocks and matrices."""

import math

import pytest
import torch

from hf_cod import (
    LayerAllocation,
    LayerScores,
    OwlBnbConfig,
    allocate,
    factorize,
    find_decoder_layers,
    prune,
    quantize,
    score_layers,
)
from hf_cod.compression.quantization.plan import plan_bits
from hf_cod.layers.parts import parts_of
from hf_cod.scoring.layer_scores import PartScore
from tests import references
from tests.tiny_models import build

BUDGETS = {"sparsity": 0.6, "rank": 0.5, "parameter_share": 0.7}


def model(**options):
    return build("llama", hidden_size=128, intermediate_size=256, **options)


def batches():
    return [{"input_ids": torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(1))}]


def scored(m, method="owl", granularity="module"):
    return score_layers(m, method=method, batches=batches(), granularity=granularity)


def last(name):
    return name.rpartition(".")[2]


def test_owl_of_a_matrix_is_that_of_the_formula():
    m = model().double()
    scores = score_layers(m, method="owl", batches=batches(), granularity="module", threshold=2.0)
    for part in scores.parts:
        (name,) = part.sizes
        pair = references.linear_inputs(m, batches(), part.layer)[name]
        assert part.value == pytest.approx(references.outlier_ratio([pair], 2.0), abs=1e-12) and part.value > 0
    of_layer = [part for part in scores.parts if part.layer == 1]
    total = sum(part.weights for part in of_layer)
    assert scores.values[1] == pytest.approx(sum(part.value * part.weights for part in of_layer) / total)


@pytest.mark.parametrize("method", ["owl", "fisher", "weight_norm", "uniform", "depth", "random"])
def test_methods_of_parts(method, tmp_path):
    for granularity in ("block", "module"):
        scores = scored(model(), method, granularity)
        assert scores.granularity == granularity and all(math.isfinite(part.value) for part in scores.parts)
        scores.save(tmp_path / "scores.json")
        assert LayerScores.load(tmp_path / "scores.json") == scores


@pytest.mark.parametrize("method", ["angular", "gradient_norm", "layer_drop", "sensitivity"])
def test_methods_of_whole_layers_are_refused(method):
    with pytest.raises(ValueError, match=f"granularity: expected .*{method}"):
        scored(model(), method)


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("kind", BUDGETS)
def test_budgets_are_met_and_plans_are_read_back(kind, granularity, tmp_path):
    scores = scored(model(), granularity=granularity)
    plan = allocate(scores, kind, BUDGETS[kind])
    sizes = {name: size for part in scores.parts for name, size in part.sizes.items()}
    total = sum(plan.modules[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert total == pytest.approx(BUDGETS[kind]) == pytest.approx(plan.mean)
    if granularity == "block":
        assert len({plan.modules[n] for n in scores.parts[0].sizes}) == 1
    plan.save(tmp_path / "plan.json")
    assert LayerAllocation.load(tmp_path / "plan.json") == plan
    assert allocate(scores, kind, BUDGETS[kind], granularity="layer").modules == {}


def test_finer_plans_require_finer_scores():
    coarse = score_layers(model(), method="uniform")
    with pytest.raises(ValueError, match="granularity: expected layer with these scores, got module"):
        allocate(coarse, "sparsity", 0.5, granularity="module")


def test_prune_by_matrices(tmp_path):
    m = model()
    plan = allocate(scored(m, "random"), "sparsity", 0.5, 0.3)
    found = prune(m, plan, "magnitude").results["module_sparsity"]
    assert found == pytest.approx(plan.modules, abs=1e-3) and len({round(v, 3) for v in found.values()}) > 10
    pattern = allocate(scored(m, "random"), "sparsity", 0.5, 0.3, group=8)
    report = prune(model(), pattern, "magnitude")
    assert report.results["module_sparsity"] == pytest.approx(pattern.modules)
    with pytest.raises(ValueError, match="plan: expected a value for each matrix"):
        prune(
            build("llama", hidden_size=128, intermediate_size=256, layers=4),
            LayerAllocation("sparsity", 0.5, [0.5] * 4, [1] * 4, "owl", granularity="module", modules={"a": 0.5}),
            "magnitude",
        )


@pytest.mark.parametrize("bits", [3.3, 3.5, 3.8])
@pytest.mark.parametrize("granularity", ["block", "module"])
def test_fused_matrices_share_a_width_within_the_budget(bits, granularity):
    m = model()
    scores = scored(m, "random", granularity)
    plan = plan_bits(m, bits, scores=scores)
    largest = 2 * 128 * 256 if granularity == "module" else 3 * 128 * 256
    assert bits - largest / plan.weights <= plan.stored <= bits
    for names in (part.names for part in parts_of(find_decoder_layers(m), "module", fuses=True)):
        assert len({plan.bits[name] for name in names}) == 1
    assert {*plan.bits.values()} == {3, 4}


def test_the_matrices_with_the_highest_scores_get_four_bits():
    m = model()
    scores = scored(m, "random", "block")
    plan = plan_bits(m, 3.6, scores=scores)
    first = max(scores.parts, key=lambda part: part.value)
    assert {plan.bits[name] for name in first.sizes} == {4}


def test_logarithms_of_costs_are_fused_as_costs():
    """Costs of several matrices add up; their logarithms do not."""
    parts = [PartScore(0, math.log(8.0), {"a.q_proj": 100}), PartScore(0, math.log(2.0), {"a.k_proj": 50})]
    fisher, owl = (
        LayerScores("m", name, [0.0], [150], granularity="module", parts=parts) for name in ("fisher", "owl")
    )
    assert fisher.value_of(0, ["a.q_proj", "a.k_proj"]) == pytest.approx(math.log((8 * 100 + 2 * 50) / 150))
    assert owl.value_of(0, ["a.q_proj", "a.k_proj"]) == pytest.approx((math.log(8) * 100 + math.log(2) * 50) / 150)


def test_quantize_by_an_allocation_of_matrices():
    m = model()
    plan = allocate(scored(m, "random"), "bits", 3.5)
    report = quantize(m, OwlBnbConfig(allocation=plan))
    assert report.results["module_bits"] == plan.modules
    with pytest.raises(ValueError, match=r"^parts: expected some for block and module"):
        LayerScores("", "owl", [1.0], [1], granularity="module")


def test_factorize_by_matrices():
    m = model()
    plan = allocate(scored(m, "random"), "parameter_share", 0.5, 0.2)
    before = sum(p.numel() for n, p in m.named_parameters() if "proj" in n)
    factorize(m, plan, method="plain")
    after = sum(p.numel() for n, p in m.named_parameters() if "proj" in n)
    assert 0.47 <= after / before <= 0.5


def test_one_layer_and_equal_scores():
    m = model(layers=1)
    plan = allocate(scored(m, "uniform"), "sparsity", 0.5)
    assert {*plan.modules.values()} == {0.5} and plan.values == [0.5]
