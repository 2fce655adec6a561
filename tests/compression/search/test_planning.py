"""`search_plan`: compared with a naive loop over all plans; seeded, resumable, applied by prune and others."""

import copy
import itertools

import pytest
import torch

from hf_cod import (
    LayerAllocation,
    LayerScores,
    OwlBnbConfig,
    collect_statistics,
    export,
    find_decoder_layers,
    prune,
    quantize,
    score_layers,
    search_plan,
    split_samples,
)
from hf_cod.compression.search.plan_probe import PlanProbe
from hf_cod.functional import codebook
from hf_cod.io.journal import Journal
from hf_cod.layers.parts import parts_of
from tests.tiny_models import build

SHAPES = {"hidden_size": 64, "intermediate_size": 128}
PASSES = 200


def model(layers=4):
    return build("llama", layers=layers, **SHAPES).eval()


def batches(samples=8):
    ids = torch.randint(1, 60, (samples, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[-1, 9:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def found(m, kind, budget, **more):
    return search_plan(m, kind, budget, batches=batches(), **{"passes": PASSES, "offspring": 8, **more})


@torch.no_grad()
def divergence(intact, changed, seen):
    """KL(intact || changed) per real token, in float64."""
    (batch,) = seen
    p, q = (m(**batch).logits.double().log_softmax(-1) for m in (intact, changed))
    return float((p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()].mean())


@torch.no_grad()
def rounded(m, widths, statistics):
    changed = copy.deepcopy(m)
    for name, bits in widths.items():
        W = changed.get_submodule(name).weight
        W.copy_(codebook.rounded(W, bits, statistics.squares[name]))
    return changed


def test_it_finds_the_best_of_all_plans():
    """Six plans with two of four layers in four bits, each measured by a copy of the model."""
    m = model()
    first, second = split_samples(batches(), 4)
    statistics = collect_statistics(m, first)
    parts = parts_of(find_decoder_layers(m), "layer")
    losses = {}
    for many in itertools.combinations(range(4), 2):
        widths = {name: 4 if part.layer in many else 3 for part in parts for name in part.names}
        losses[many] = divergence(m, rounded(m, widths, statistics), second)
    worst = max(losses, key=losses.get)
    sizes = score_layers(m, method="uniform").parameters
    scores = LayerScores("", "worst", [float(i in worst) for i in range(4)], sizes)
    plan = found(m, "bits", 3.7, granularity="layer", scores=scores)
    assert plan.values == [4.0 if i in min(losses, key=losses.get) else 3.0 for i in range(4)]
    assert plan.search["divergence"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert plan.search["uniform_divergence"] == pytest.approx(losses[0, 1], rel=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "block", "module"])
@pytest.mark.parametrize("kind, budget", [("sparsity", 0.6), ("bits", 3.6)])
def test_it_keeps_the_budget_and_is_never_worse_than_its_start(kind, budget, granularity):
    m = model()
    before = copy.deepcopy(m.state_dict())
    plan = found(m, kind, budget, granularity=granularity)
    told = plan.search
    assert told["divergence"] <= told["start_divergence"] <= told["uniform_divergence"]
    assert told["passes"] <= PASSES and told["samples"] == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in m.state_dict().items())
    if kind == "sparsity":
        weights = sum(plan.parameters)
        zeros = sum(value * size for value, size in zip(plan.values, plan.parameters, strict=True))
        assert zeros == pytest.approx(round(budget * weights), abs=1e-6)
        report = prune(m, plan, "magnitude")
        assert report.results["sparsity"] == pytest.approx(budget, abs=len(before) / weights)
        return
    config = OwlBnbConfig(allocation=plan)
    report = quantize(m, config)
    spare = (budget - report.results["bits"]) * sum(plan.parameters)
    widths = report.results["module_bits"]
    parts = parts_of(find_decoder_layers(m), granularity, fuses=True)
    assert all(len({widths[name] for name in part.names}) == 1 for part in parts)
    assert (
        0
        <= spare
        < min(
            sum(before[f"{name}.weight"].numel() for name in part.names)
            for part in parts
            if any(widths[name] == 3 for name in part.names)
        )
    )


def test_a_seed_gives_a_plan_and_another_seed_another():
    m = model(2)
    first, again, other = (found(m, "sparsity", 0.6, seed=seed, scores=uniform(m)) for seed in (0, 0, 1))
    assert first == again and first.modules != other.modules


@pytest.mark.parametrize("kind, budget", [("sparsity", 0.6), ("bits", 3.6)])
def test_a_killed_search_resumes_to_the_same_plan(kind, budget, tmp_path, monkeypatch):
    m = model(2)
    more = {"scores": uniform(m), "passes": 120}
    whole = found(m, kind, budget, **more)
    add, written = Journal.add, []

    def killed(journal, key, value):
        add(journal, key, value)
        written.append(key)
        if len(written) == 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", killed)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(KeyboardInterrupt):
        found(m, kind, budget, journal=tmp_path, **more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in m.state_dict().items())
    assert found(m, kind, budget, journal=tmp_path, **more) == whole
    assert len(written) == len(set(written)) == whole.search["passes"]


def test_fused_matrices_share_a_width_and_export_takes_the_plan(tmp_path):
    m = build("llama", layers=3, hidden_size=256, intermediate_size=512).eval()
    plan = found(m, "bits", 3.6, scores=uniform(m), passes=100)
    plan.save(tmp_path / "plan.json")
    plan = LayerAllocation.load(tmp_path / "plan.json")
    report = export(m, tmp_path / "made", to="gptqmodel", plan=plan)
    assert report.results["search"] == plan.search and str(plan.search["passes"]) in report.summary[-1]
    assert report.results["module_bits"] == {name: int(bits) for name, bits in plan.modules.items()}


def test_the_cost_is_printed_before_the_search(capsys, monkeypatch):
    printed = []
    monkeypatch.setattr(PlanProbe, "of_plans", lambda *a: (printed.append(capsys.readouterr().out), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        found(model(), "sparsity", 0.6, show_progress=True)
    assert f"take up to {PASSES} forward passes of one sample (50 of all 4 samples), and 1 MiB" in printed[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "bits", "budget": 3}, "budget: expected stored bits between"),
        ({"kind": "bits", "budget": 4.9}, "bits: expected 3, 4, or 3.1"),
        ({"kind": "rank", "budget": 0.5}, "kind: "),
        ({"kind": "sparsity", "budget": 1.0}, "budget: expected a sparsity between 0 and 1"),
        ({"kind": "sparsity", "budget": 0.5, "passes": 9}, "passes: expected at least"),
        ({"kind": "sparsity", "budget": 0.5, "batches": batches(1)}, "batches: expected at least two samples"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        search_plan(model(2), **{"batches": batches(), **arguments})


def test_it_requires_a_language_model():
    with pytest.raises(ValueError, match="model: expected a language model"):
        search_plan(
            build("bert"), "sparsity", 0.5, batches=batches(), pruner="magnitude", scores=uniform(build("bert"))
        )


def uniform(m):
    return score_layers(m, method="uniform")
