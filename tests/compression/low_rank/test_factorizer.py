import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_cod import (
    LayerAllocation,
    LayerScores,
    RankPlan,
    SparseLinear,
    allocate,
    factorize,
    find_decoder_layers,
    pack_sparse,
    perplexity,
    plan_ranks,
    prune,
)
from hf_cod.compression.low_rank.factorizer import METHODS
from hf_cod.compression.low_rank.settings import FACTOR_SHARE
from hf_cod.functional.factorization import DAMPING
from hf_cod.functional.factorization import factorize as whitened
from hf_cod.functional.ranks import count, most_rank, rank_of_weights
from hf_cod.functional.sparse_low_rank import decompose, sizes_of_weights
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import SampleSettings, split_samples, token_batches
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.models.factors import LowRankExperts, LowRankLinear
from tests import references
from tests.fresh_processes import run_fresh
from tests.tiny_models import CAUSAL, OTHERS, PLAIN, batch_for, build, double, outputs, two_batches


def factors(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankExperts, LowRankLinear))}


def loaded_again(model, folder):
    """The model out of its files, with the same weights. Where these lie in memory decides the last bit of a product,
    so that it is this one that other processes must equal; a tiny model in bfloat16 also has rounded frequencies.
    """
    loaded, state = AutoModelForCausalLM.from_pretrained(folder), model.state_dict()
    assert loaded.dtype is model.dtype and loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    if model.dtype is torch.float32:
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)
    return loaded


def by_hand(model, batches, ranks, whitened=True):
    """Layer by layer: the whole model runs, with the layers before changed already, and every matrix by the formula;
    the product stands in the dense matrix.
    """
    model = copy.deepcopy(model)
    for index in range(len(find_decoder_layers(model))):
        for name, (W, X) in references.linear_inputs(model, batches, index).items():
            if name not in ranks:
                continue
            H, damping = (X.T @ X, DAMPING) if whitened else (torch.eye(W.shape[1], dtype=W.dtype), 0)
            product, _ = references.whitened_svd(W, H, ranks[name], damping)
            module = model.get_submodule(name)
            module.weight.data.copy_(product if isinstance(module, nn.Linear) else product.T)
    return model


@pytest.mark.parametrize("method", ["whitened", "plain"])
@pytest.mark.parametrize("family", PLAIN)
def test_every_family_against_the_formula(family, method):
    model = build(family, layers=3, dtype=torch.float64)
    batches = double(two_batches(model, "left"))
    intact = copy.deepcopy(model)
    report = factorize(model, 0.6, method, batches=batches)
    expected = by_hand(intact, batches, report.results["ranks"], method == "whitened")
    assert len(factors(model)) == len(report.results["ranks"]) > 3
    for name, module in factors(model).items():
        torch.testing.assert_close(module.weight, outer(expected, name), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(outputs(model, batches[0]), outputs(expected, batches[0]), rtol=1e-5, atol=1e-7)


def outer(model, name):
    module = model.get_submodule(name)
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


@pytest.mark.parametrize("family", [*CAUSAL, *OTHERS])
def test_applied_saved_and_loaded_again(family, tmp_path):
    model = build(family, dtype=torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_for(model).items()}
    kept = {"mixtral": 0.95, "gpt_oss": 0.95, "qwen2_moe": 0.9, "deepseek_v3": 0.8}.get(family, 0.6)
    before = sum(p.numel() for p in model.parameters())
    report = factorize(model, kept, batches=[batch])
    found = report.results["parameters"]
    assert found == {"intact": before, "factorized": sum(p.numel() for p in model.parameters())}
    assert (
        kept - 0.12 < report.results["parameter_share"] <= kept
    )  # rounded down, at the rank of 5 or so that it takes here
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len(factors(loaded)) == len(factors(model)) == len(report.results["ranks"])
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, batch), outputs(again, batch))


@pytest.mark.process
@pytest.mark.parametrize("method, dtype", [("whitened", torch.float32), ("oats", torch.bfloat16)])
def test_a_fresh_process_and_one_without_the_package(method, dtype, tmp_path):
    model = build("llama_tied", dtype=dtype)
    factorize(model, 0.5, method, batches=two_batches(model))
    model.save_pretrained(tmp_path)
    expected = outputs(loaded_again(model, tmp_path), {"input_ids": torch.arange(3, 12)[None]})
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    for start, options in (("import hf_cod", ""), ("sys.path.insert(0, 'hidden')", ", trust_remote_code=True")):
        code = (
            f"import sys, torch\n{start}\nfrom transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained('.'{options})\n"
            "print(type(model).__module__)\n"
            "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), 'logits.pt')\n"
        )
        done = run_fresh(code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("hf_cod." if not options else "transformers_modules.")
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_nothing_else_changes_and_the_model_is_left_as_it_was():
    model = build("gpt2").train()
    names = {n for i in range(4) for n in find_decoder_layers(model).linears(i)}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in names}
    factorize(model, 0.7, batches=two_batches(model))
    assert all(torch.equal(p, others[n.replace(".expand", "")]) for n, p in model.named_parameters() if p.dim() == 1)
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, Conv1D) for m in factors(model).values())


def test_a_model_that_reads_the_sizes_of_a_matrix(monkeypatch):
    """It gets those of the whole matrix, while the layers have its factors."""

    def scaled(self, x):
        rows, columns = self.down_proj.out_features, self.down_proj.in_features
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * (rows / columns)

    model = build("llama")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", scaled)
    whole = copy.deepcopy(model)
    ranks = factorize(model, 0.7, "plain").results["ranks"]
    for name in ranks:
        whole.get_submodule(name).weight.data = model.get_submodule(name).weight.detach()
    torch.testing.assert_close(outputs(model), outputs(whole))
    named = {name for index in range(4) for name in find_decoder_layers(model).linears(index)}
    assert {f"{name}.reduce" for name in ranks} <= named and named.isdisjoint(ranks)


@pytest.mark.parametrize("kind", ["parameter_share", "rank"])
def test_an_allocation_is_met_layer_by_layer(kind):
    model = build("llama", hidden_size=64, intermediate_size=96)
    stack = find_decoder_layers(model)
    scores = LayerScores("m", "mine", [3.0, 1.0, 2.0, 2.5], [stack.count_weights(0)] * 4)
    plan = allocate(scores, kind, 0.4, 0.1)
    report = factorize(model, plan, batches=[batch_for(model)])
    found = report.layers["parameter_share" if kind == "parameter_share" else "full_rank_share"]
    assert [value - share for value, share in zip(found, plan.values, strict=True)] == pytest.approx([0] * 4, abs=0.05)
    assert all(value <= share + 1e-9 for value, share in zip(found, plan.values, strict=True))
    assert report.settings["plan"] == f"{kind} 0.4 by mine"
    assert len(set(report.layers["parameter_share"])) > 2


def test_kept_is_what_is_counted_in_the_model():
    model = build("llama", hidden_size=64, intermediate_size=96)
    before = find_decoder_layers(model).count_weights(2)
    report = factorize(model, 0.5, batches=[batch_for(model)])
    left = sum(p.numel() for p in model.model.layers[2].parameters() if p.dim() == 2)
    assert (
        report.layers["parameter_share"][2] == pytest.approx(left / before) and report.layers["parameters"][2] == before
    )
    assert all(0 < error < 1 for error in report.layers["error"])


def test_equal_scores_and_a_single_layer():
    model = build("llama", layers=1)
    scores = LayerScores("m", "mine", [2.0], [find_decoder_layers(model).count_weights(0)])
    report = factorize(model, allocate(scores, "parameter_share", 0.7), batches=[batch_for(model)])
    assert report.layers["parameter_share"][0] <= 0.7
    one, two = build("llama"), build("llama")
    scores = LayerScores("m", "mine", [2.0] * 4, [find_decoder_layers(one).count_weights(0)] * 4)
    factorize(one, allocate(scores, "parameter_share", 0.7), batches=[batch_for(one)])
    factorize(two, 0.7, batches=[batch_for(two)])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_rank_that_would_enlarge_leaves_the_matrix_whole():
    model = build("llama")  # q and o are square, k and v 16 x 32, the MLP 48 x 32
    scores = LayerScores("m", "mine", [1.0] * 4, [find_decoder_layers(model).count_weights(0)] * 4)
    report = factorize(model, allocate(scores, "rank", 0.55), batches=[batch_for(model)])
    cut = {name.rsplit(".", 1)[-1] for name in report.results["ranks"]}
    assert cut == {"k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(LowRankLinear is not type(layer.self_attn.q_proj) for layer in model.model.layers)
    with pytest.raises(ValueError, match="plan: expected ranks at which factors have fewer weights than a matrix, got"):
        factorize(build("llama"), allocate(scores, "rank", 0.9), batches=[batch_for(model)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("text", [True, False])
def test_a_plan_by_spectra_keeps_the_budget(family, text, tmp_path):
    model = build(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = two_batches(model) if text else None
    plan = plan_ranks(model, 0.9, batches=batches)
    assert plan.method == ("fisher" if text else "spectrum")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert RankPlan.load(plan.save(tmp_path / "plan.json")) == plan
    report = factorize(model, plan, batches=two_batches(model))
    assert 0.85 < report.results["parameter_share"] <= 0.9
    assert len(set(plan.ranks.values())) > 1


def test_spectra_take_one_pass():
    model, runs = build("llama"), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, _: runs.append((args[0].shape[:2], layer.self_attn.layer_idx)))
    batches = two_batches(model)
    plan_ranks(model, 0.6, "spectrum", batches=batches)
    shapes = {batch["input_ids"].shape for batch in batches}
    assert all(samples > 1 for samples, _ in shapes), "one sample shows before whether layers run alone"
    assert [layer for shape, layer in runs if shape in shapes] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", range(5))
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(method, stop, tmp_path, monkeypatch):
    batches = two_batches(build("llama"), "left")
    whole = build("llama")
    expected = factorize(whole, 0.5, method, batches=batches)
    add, done = FinishedLayers.add, []

    def dies(self, index, note):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(index)
        add(self, index, note)

    monkeypatch.setattr(FinishedLayers, "add", dies)
    try:
        factorize(build("llama"), 0.5, method, batches=batches, journal=tmp_path)
    except KeyboardInterrupt:
        assert stop < 4
    assert len(list(tmp_path.iterdir())) == stop
    added = []
    monkeypatch.setattr(FinishedLayers, "add", lambda self, i, note: (added.append(i), add(self, i, note)))
    resumed = build("llama")
    report = factorize(resumed, 0.5, method, batches=batches, journal=tmp_path)
    assert added == list(range(stop, 4)), "finished layers are not factorized again"
    assert report.layers == expected.layers and report.results == expected.results
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_spectra_resume_and_other_work_is_not_taken(tmp_path, monkeypatch):
    batches = two_batches(build("llama"))
    plan = plan_ranks(build("llama"), 0.6, batches=batches, journal=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(FinishedLayers, "add", lambda *arguments: pytest.fail("measured again"))
    assert plan_ranks(build("llama"), 0.6, batches=batches, journal=tmp_path) == plan
    assert plan_ranks(build("llama"), 0.5, batches=batches, journal=tmp_path) != plan, "another budget, same spectra"
    monkeypatch.undo()
    plan_ranks(build("llama"), 0.6, batches=batches[:1], journal=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


def test_after_an_error_the_model_can_be_saved_as_it_is(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"first at the input of model.layers.2.self_attn.q_proj, batch 0"):
        factorize(model, 0.5, batches=two_batches(model))
    assert {int(name.split(".")[2]) for name in factors(model)} == {0, 1}
    model.save_pretrained(tmp_path)
    assert len(factors(AutoModelForCausalLM.from_pretrained(tmp_path))) == len(factors(model)) == 14


def test_after_an_error_in_the_first_layer_it_is_the_model_that_it_was():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"first at the input of model.layers.0.self_attn.q_proj, batch 0"):
        factorize(model, 0.5, batches=two_batches(model))
    assert type(model) is type(build("llama")) and not factors(model)


def test_factors_can_be_pruned_and_stored_without_zeros(tmp_path):
    """The place that quantizers have is free."""
    model = build("llama", hidden_size=64, intermediate_size=96)
    factorize(model, 0.6, batches=two_batches(model))
    report = prune(model, 0.7, batches=two_batches(model))
    assert "model.layers.1.mlp.up_proj.reduce" in report.results["module_sparsity"]
    pack_sparse(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[1].mlp.up_proj.reduce, SparseLinear)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_parts_against_the_formula_and_as_they_are_counted(family, dtype, tmp_path):
    """The first layer's inputs are those of the intact model; in bfloat16 some of what is kept may be rounded to 0."""
    model = build(family, dtype=dtype)
    intact, batches = copy.deepcopy(model), two_batches(model)
    report = factorize(model, 0.6, "oats", batches=batches, factor_share=0.4)
    ranks, nonzeros = report.results["ranks"], report.results["nonzeros"]
    total = sum(report.layers["parameters"])
    assert ranks.keys() == nonzeros.keys() == factors(model).keys()
    assert (
        report.results["parameter_share"] == pytest.approx(0.6, abs=len(ranks) / total)
        and report.results["parameter_share"] <= 0.6
    )
    shapes = {name: tuple(module.weight.shape) for name, module in factors(model).items()}
    whole = sum(count(shapes[name], None) for name in ranks)
    left = sum(count(shapes[name], ranks[name], nonzeros[name]) for name in ranks)
    assert report.results["parameters"]["intact"] - report.results["parameters"]["factorized"] == whole - left
    for name, module in factors(model).items():
        stored = int(module.sparse.weight.count_nonzero())
        assert stored == nonzeros[name] if dtype is torch.float32 else 0.9 * nonzeros[name] < stored <= nonzeros[name]
    errors = []
    for name, (W, X) in references.linear_inputs(intact, batches, 0).items():
        S, B, A, lost = decompose(W, ranks[name], nonzeros[name], X.double().T @ X.double())
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(factors(model)[name].weight.double(), S + B @ A, **tolerance)
        errors.append(lost)
    assert report.layers["error"][0] == pytest.approx(sum(errors) / len(errors), rel=0.05)
    model.save_pretrained(tmp_path)
    assert factors(loaded_again(model, tmp_path)).keys() == ranks.keys()


@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_parts_are_packed_and_loaded_in_a_fresh_process(dtype, tmp_path):
    model = build("llama", hidden_size=64, intermediate_size=96, dtype=dtype)
    factorize(model, 0.6, "oats", batches=two_batches(model))
    pack_sparse(model, 0.3)
    assert len(factors(model)) == 4 * 7
    assert all(isinstance(module.sparse, SparseLinear) for module in factors(model).values())
    assert all(type(module.expand) is nn.Linear for module in factors(model).values()), "they have no zeros"
    model.save_pretrained(tmp_path)
    code = (
        "import hf_cod, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "print(type(model.model.layers[1].mlp.up_proj.sparse).__name__)\n"
        "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), 'logits.pt')\n"
    )
    done = run_fresh(code, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "SparseLinear\n", done.stderr[-2000:]
    expected = outputs(loaded_again(model, tmp_path), {"input_ids": torch.arange(3, 12)[None]})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_matrix_without_a_sparse_part_and_bad_plans_of_them(tmp_path):
    """A share of which the factors take all: what is left for the sparse part is nothing."""
    name, other = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
    model = build("llama")
    plan = RankPlan("parameter_share", 0.5, {name: 5, other: 5}, "mine", {name: 0, other: 48})
    assert RankPlan.load(plan.save(tmp_path / "plan.json")) == plan
    factorize(model, plan, "oats", batches=two_batches(model))
    assert factors(model)[name].sparse is None and int(factors(model)[other].sparse.weight.count_nonzero()) == 48
    model.save_pretrained(tmp_path)
    assert factors(loaded_again(model, tmp_path)).keys() == {name, other}
    model, batches = build("llama"), two_batches(build("llama"))
    most = 48 * 32 - 5 * (48 + 32) - 1
    for nonzeros, method, message in [
        ({}, "oats", "plan: expected nonzeros for oats, next to ranks, got none; oats takes one share"),
        ({name: 5}, "plain", "plan: expected no nonzeros, got some"),
        ({name: most + 1}, "oats", rf"nonzeros: expected 0..{most} for {name}, .* 48 x 32, got {most + 1}"),
        ({name: 2.5}, "oats", rf"nonzeros: expected 0..{most} for {name}"),
        ({name: 5, other: 5}, "oats", f"nonzeros: expected matrices that have a rank, got '{other}'"),
    ]:
        with pytest.raises(ValueError, match=message):
            factorize(model, RankPlan("parameter_share", 0.5, {name: 5}, "mine", nonzeros), method, batches=batches)
    sizes = [find_decoder_layers(model).count_weights(0)] * 4
    allocation = LayerAllocation("rank", 0.5, [0.5] * 4, sizes, "x")
    with pytest.raises(ValueError, match="plan: expected an allocation of parameter_share, got one of rank"):
        factorize(model, allocation, "oats", batches=batches)
    for share in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="factor_share: expected a share between 0 and 1, got"):
            factorize(model, 0.5, "oats", batches=batches, factor_share=share)
    with pytest.raises(
        ValueError, match=r"factor_share: expected none with method plain, which does not use it, got 0.5"
    ):
        factorize(model, 0.5, "plain", factor_share=0.5)
    with pytest.raises(ValueError, match="batches: expected batches, or tokenizer and texts, for oats, got neither"):
        factorize(model, 0.5, "oats")
    assert not factors(model)


def test_budgets_out_of_reach_say_the_least():
    model = build("llama")
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    least = sum(count(s, 1) for s in shapes) / sum(count(s, None) for s in shapes)
    for call in (lambda: factorize(model, 0.01, "plain"), lambda: plan_ranks(model, 0.01)):
        with pytest.raises(ValueError, match=r"parameter_share: expected .*0\.\d+") as raised:
            call()
        assert f"{least:.3f}"[:-1] in str(raised.value) and "rank 1" in str(raised.value)
    with pytest.raises(ValueError, match=r"plan: expected a share of parameters in 0..1, got 1.5"):
        factorize(model, 1.5, "plain")
    with pytest.raises(ValueError, match=r"parameter_share: expected a share in .*, got nan"):
        plan_ranks(model, float("nan"))


def test_bad_plans():
    model = build("llama")
    name = "model.layers.0.mlp.up_proj"
    most = most_rank((48, 32))
    for ranks, message in [
        ({name: 33}, rf"ranks: expected 1..{most} for {name}, .* its 48 x 32, got 33"),
        ({name: 0}, rf"ranks: expected 1..{most} for {name}"),
        ({"model.norm": 3}, "ranks: expected matrices of LlamaForCausalLM, got 'model.norm'"),
        ({}, "plan: expected ranks at which"),
    ]:
        with pytest.raises(ValueError, match=message):
            factorize(model, RankPlan("parameter_share", 0.5, ranks, "mine"), "plain")
    for plan, message in [
        (LayerAllocation("bits", 3, [3.0] * 4, [1] * 4, "x"), "allocation of parameter_share or rank, got one of bits"),
        (LayerAllocation("rank", 0.5, [0.5] * 3, [1] * 3, "x"), "plan: expected 4 values, one a layer, got 3"),
        (LayerAllocation("rank", 0.5, [0.5, 1.2, 0.1, 0], [1] * 4, "x"), "got 1.2 in layer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            factorize(model, plan, "plain")
    with pytest.raises(ValueError, match="method: expected one of whitened, plain, oats, got 'best'"):
        factorize(model, 0.5, "best")
    with pytest.raises(
        ValueError, match="batches: expected batches, or tokenizer and texts, for whitened, got neither"
    ):
        factorize(model, 0.5)
    for call in (factorize, plan_ranks):
        with pytest.raises(ValueError, match="batches: expected dicts of tensors for the model's forward, got str"):
            call(model, 0.5, batches=["some text"])
        with pytest.raises(
            ValueError, match="batches: expected a list, which is read several times, got list_iterator"
        ):
            call(model, 0.5, batches=iter(two_batches(model)))


def test_plans_of_another_model_are_refused(tmp_path, caplog):
    """Of another size; of another name alone, it is said."""
    model, other = build("llama"), build("llama", intermediate_size=64)
    sizes = [find_decoder_layers(other).count_weights(0)] * 4
    scores = LayerScores("some/other", "mine", [1.0, 2.0, 3.0, 4.0], sizes)
    whole = plan_ranks(other, 0.5)
    message = (
        f"plan: expected those of a model with {find_decoder_layers(model).count_weights(0)} weights in layer 0, got"
    )
    for plan in (allocate(scores, "parameter_share", 0.5), allocate(scores, "rank", 0.3), whole):
        with pytest.raises(ValueError, match=rf"{message} one with {sizes[0]} \(.*\)"):
            factorize(model, plan, "plain")
    assert not factors(model)
    with pytest.raises(ValueError, match="plan: expected those of a model with 3 layers, got 4"):
        factorize(build("llama", layers=3), plan_ranks(model, 0.5), "plain")
    assert RankPlan.load(whole.save(tmp_path / "plan.json")) == whole and whole.sizes == sizes
    assert not caplog.messages
    factorize(other, allocate(scores, "parameter_share", 0.5), "plain")
    assert "plan: used on LlamaForCausalLM, but computed for some/other, which has layers" in caplog.text


def test_weights_that_cannot_be_exchanged_are_refused_before_anything_changes():
    shared, broken, twice = (build("llama") for _ in range(3))
    shared.model.layers[3].mlp.up_proj = shared.model.layers[1].mlp.up_proj
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[3, 4] = torch.inf
    factorize(twice, 0.5, "plain")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    for model, message in [
        (shared, r"a separate weight for each matrix, got model.layers.1.mlp.up_proj.weight"),
        (broken, "weights: expected finite numbers, got NaN or infinity in model.layers.3.mlp.up_proj"),
        (twice, r"model: expected dense matrices, got factors in model.layers.0.self_attn.q_proj"),
        (adapted, r"got an adapter at model.layers.0.mlp.up_proj; call merge_and_unload first"),
    ]:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            factorize(model, 0.5, batches=[batch_for(build("llama"))])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model: expected a class of transformers or hf_cod, .* got"):
        factorize(type("Own", (type(build("llama")),), {})(build("llama").config), 0.5, "plain")


@pytest.mark.slow
def test_what_helps_on_a_real_model(smollm2, brown_text):
    """Four samples of 256 tokens to whiten with are few; plain truncation breaks the model however many there are."""
    found = {}
    for name in ("whitened", "plain", "fisher"):
        model, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
        settings = SampleSettings(sequence_length=256, max_samples=8, batch_size=4)
        calibration, measuring = split_samples(token_batches(tokenizer, brown_text, settings), 4)
        intact = perplexity(model, measuring)
        plan = plan_ranks(model, 0.8, name, batches=calibration) if name == "fisher" else 0.8
        report = factorize(model, plan, name if name in METHODS else "whitened", batches=calibration)
        assert 0.79 < report.results["parameter_share"] <= 0.8
        found[name] = perplexity(model, measuring)
    print(found)
    assert intact < found["fisher"] < found["whitened"] / 1.5 and found["whitened"] < found["plain"] / 20


def test_a_sparse_part_helps_matrices_of_a_real_model(smollm2, brown_text):
    """With as many weights, outputs lose less energy than by the factors alone that lose the least of it."""
    model, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
    batches = token_batches(tokenizer, brown_text, SampleSettings(sequence_length=256, max_samples=4, batch_size=4))
    inputs = references.linear_inputs(model, batches, 3)
    for name in ("self_attn.k_proj", "self_attn.o_proj"):
        W, X = inputs[f"model.layers.3.{name}"]
        H, (r, k) = X.double().T @ X.double(), sizes_of_weights(tuple(W.shape), 0.7, FACTOR_SHARE)
        *_, oats = decompose(W, r, k, H)
        B, A, _ = whitened(W, rank_of_weights(tuple(W.shape), 0.7), H)
        lost = W.double() - B @ A
        alone = float((lost @ H * lost).sum() / (W.double() @ H * W.double()).sum())
        per_row = k // len(W)
        few, steps = decompose(W, r, per_row * len(W), H, 20), references.oats(W.double(), H, r, per_row, 20)
        missed = [W.double() - S - L for S, L in ((few[0], few[1] @ few[2]), steps)]
        short, exact = ((E * H.diagonal().sqrt()).norm() for E in missed)
        print(name, oats, alone, short / exact)
        assert oats < 0.7 * alone and short < 1.005 * exact
