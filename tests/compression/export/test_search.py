"""`export(search=True)`: compared with a naive loop over all plans of an engine."""

import copy
import itertools

import pytest
import torch

from hf_cod import BitPlan, collect_statistics, export, find_decoder_layers, split_samples
from hf_cod.compression.export.llama_cpp import type_of
from hf_cod.compression.export.search import on_grid
from hf_cod.compression.export.targets import TARGETS
from tests.compression.export.models import llama

DOWN = ["down_proj"]


def samples(count=8):
    ids = torch.randint(1, 60, (count, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": ids}]


@torch.no_grad()
def divergence(intact, changed, seen):
    (batch,) = seen
    p, q = (m(**batch).logits.double().log_softmax(-1) for m in (intact, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_finds_the_best_of_all_plans(tmp_path):
    """Widths 3 to 6 for each of three matrices, which differ in size, in the budget of 4.4 bits, scales included."""
    model = llama(intermediate_size=256)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(128, 64, bias=False)
    for name in ("gate_proj", "up_proj"):
        setattr(model.model.layers[1].mlp, name, torch.nn.Linear(64, 128, bias=False))
    first, second = split_samples(samples(), 4)
    statistics, target = collect_statistics(model, first), TARGETS["mlx"]
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    weights = [model.get_submodule(name).weight.detach().clone() for name in names]
    budget = 4.4 * sum(W.numel() for W in weights)
    losses = {}
    for plan in itertools.product((3, 4, 5, 6), repeat=3):
        sizes = [target.stored(tuple(W.shape), width, 128, 32) for W, width in zip(weights, plan, strict=True)]
        if sum(sizes) > budget:
            continue
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, W, width in zip(names, weights, plan, strict=True):
                rounded = on_grid(W, width, statistics.squares[name], engine=target, group=128)
                changed.get_submodule(name).weight.copy_(rounded)
        losses[plan] = divergence(model, changed, second)
    report = export(
        model, tmp_path / "out", to="mlx", bits=4.4, search=True, passes=1500, batches=samples(), include=DOWN,
        journal=tmp_path / "journal",
    )  # fmt: skip
    best = min(losses, key=losses.get)
    assert len({*best}) > 1 and tuple(report.results["module_bits"].values()) == best
    assert report.results["search"]["divergence"] == pytest.approx(losses[best], rel=1e-4)
    assert report.results["planned_bytes"] * 8 <= budget and report.settings["score"] == "search"
    assert "The search found a plan" in " ".join(report.summary)
    for name, W in zip(names, weights, strict=True):
        assert torch.equal(model.get_submodule(name).weight, W)
    again = export(
        model, tmp_path / "again", to="mlx", bits=4.4, search=True, passes=1500, batches=samples(), include=DOWN,
        journal=tmp_path / "journal",
    )  # fmt: skip
    assert again.results == report.results


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_takes_part(tied, tmp_path):
    """Types of 4.5, 5.5 and 8.5 bits for two matrices, and for the embedding with the head, in one size."""
    model = llama(2, tie_word_embeddings=tied, intermediate_size=320)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)  # worth less than the embedding
    first, second = split_samples(samples(), 4)
    statistics, target = collect_statistics(model, first), TARGETS["llama.cpp"]
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    outside = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in (*names, *outside)}
    bits = {4: 4.5, 5: 5.5, 8: 8.5}
    budget = 5.5 * sum(weights[n].numel() for n in names) + bits[5] * sum(weights[n].numel() for n in outside)
    losses = {}
    for plan in itertools.product(bits, repeat=3):
        widths = dict(zip(names, plan[:2], strict=True)) | dict.fromkeys(outside, plan[2])
        if sum(bits[width] * weights[name].numel() for name, width in widths.items()) > budget:
            continue
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, width in widths.items():
                rounded = on_grid(weights[name], width, statistics.squares.get(name), engine=target, group=None)
                changed.get_submodule(name).weight.copy_(rounded)
        losses[plan] = divergence(model, changed, second)
    report = export(
        model, tmp_path / "out", to="llama.cpp", bits=5.5, embedding_bits=5, search=True, search_embedding=True,
        passes=1500, batches=samples(), include=DOWN,
    )  # fmt: skip
    best = min(losses, key=losses.get)
    assert (
        best[2] == 8
        and len(losses) > 5
        and report.results["search"]["divergence"] == pytest.approx(losses[best], rel=1e-4)
    )
    assert (*report.results["module_bits"].values(), report.results["search"]["embedding_bits"]) == best
    assert f"--token-embedding-type {type_of((99, 64), best[2])} " in report.summary[1]
    assert report.results["module_bits"].keys() == {*names}
    for name, W in weights.items():
        assert torch.equal(model.get_submodule(name).weight, W)


@pytest.mark.parametrize("to, bits", [("llama.cpp", 4.9), ("gptqmodel", 3.4), ("compressed-tensors", 3.6)])
def test_matrices_of_an_engine(to, bits, tmp_path):
    """Fused matrices share a width, the budget holds in the format of the engine, and equal sizes are not searched."""
    model = llama(hidden_size=64 if to == "llama.cpp" else 128, intermediate_size=256)
    report = export(model, tmp_path / "out", to=to, bits=bits, search=True, passes=120, batches=samples())
    found = report.results["module_bits"]
    assert bits - 0.3 < report.results["bits"] <= bits and {*found.values()} <= {*TARGETS[to].widths}
    assert report.results["search"]["divergence"] <= report.results["search"]["uniform_divergence"]
    if to == "llama.cpp":  # rows of 64: three bits would be four, iq4_nl
        assert {w for n, w in found.items() if "down_proj" not in n} <= {4, 5, 6} and 3 in found.values()
    else:
        for index in range(len(find_decoder_layers(model))):
            for group in ("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")):
                assert len({found[f"model.layers.{index}.{group[0]}.{name}"] for name in group[1]}) == 1


def test_a_grid_has_the_values_of_its_width():
    W = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    for width in (2, 3, 4):
        rounded = on_grid(W, width, torch.ones(128), engine=TARGETS["mlx"], group=64)
        assert all(len(group.unique()) <= 2**width for row in rounded for group in row.split(64))
    five = on_grid(W[:, :96], 5, None, engine=TARGETS["llama.cpp"], group=None)  # q5_0: 32 values of 32 weights
    assert torch.allclose(five, W[:, :96], atol=float(W.abs().max()) / 16)
    two = on_grid(W[:, :96], 2, None, engine=TARGETS["llama.cpp"], group=None)  # iq4_nl, which is the least type
    assert float((two - W[:, :96]).norm() / W[:, :96].norm()) < 0.12


def test_bad_input_is_one_line(tmp_path):
    model, out = llama(), tmp_path / "out"
    widths = {name: 4 for name, _ in model.named_modules() if name.endswith("proj")}
    sizes = {name: tuple(model.get_submodule(name).weight.shape) for name in widths}
    cases = [
        ({"search": True}, "batches: expected samples for the search, got none"),
        ({"search_embedding": True}, "search_embedding: expected none with no search, got True"),
        ({"search": True, "search_embedding": True}, "search_embedding: expected none with mlx, .*"),
        ({"passes": 7}, "passes: expected none with no search, got 7"),
        ({"search": True, "passes": 3, "batches": samples()}, "passes: expected at least .*"),
        ({"search": True, "batches": samples(1)}, "batches: expected at least two samples, .* got 1"),
        ({"search": True, "bits": 12.0, "batches": samples()}, "bits: expected .* to .* stored bits a weight .*"),
        ({"search": True, "plan": BitPlan(widths, sizes, "given", 4.1)}, "search: expected none with a plan.*"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=f"^{said}$") as caught:
            export(model, out, to="mlx", **options)
        assert "\n" not in str(caught.value) and not out.exists()
