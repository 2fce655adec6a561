"""The measures on request against formulas written down, one layer, sample or matrix at a time."""

import copy
import math
from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from examples.tiny_architectures import tiny_config
from hf_cod import RunReport, diagnose, find_decoder_layers
from hf_cod.analysis.diagnostics.attention_sinks import measure_attention_sinks
from hf_cod.analysis.diagnostics.causal_score import measure_causal_score
from hf_cod.analysis.diagnostics.jacobians import measure_jacobian
from hf_cod.analysis.diagnostics.logit_lens import measure_logit_lens
from hf_cod.analysis.diagnostics.massive_activations import measure_massive_activations
from hf_cod.analysis.diagnostics.permutation_score import measure_permutation_score
from hf_cod.analysis.diagnostics.settings import MORE_METRICS
from hf_cod.analysis.evaluation.choice import find_metric
from tests import references
from tests.tiny_models import FAMILIES, batch_for, build

PERPLEXITY = find_metric(None, "causal_lm")


def kept(batch, hidden):
    """(tokens, d) without padding."""
    mask = batch.get("attention_mask")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_causal_score(family):
    model = build(family)
    batch = batch_for(model, None if family == "vit" else "left")
    found = measure_causal_score(model, [batch])
    states = references.hidden_states(model, batch)
    L = len(states) - 1
    added = [kept(batch, states[m + 1] - states[m]) for m in range(L)]
    for layer in range(L - 1):
        others = references.hidden_states(references.without_layer(model, layer), batch)
        ratios = []
        for m in range(layer + 1, L):
            change = kept(batch, others[m + 1] - others[m])
            ratios += [float((a - b).norm() / a.norm()) for a, b in zip(added[m], change, strict=True)]
        assert found[layer] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert found[-1] is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_permutation_score_against_models_with_swapped_layers(family):
    model = build(family)
    batch = batch_for(model, "right")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    intact, swapped = measure_permutation_score(model, [batch], PERPLEXITY)
    assert intact == pytest.approx(math.log(references.perplexity(model, batch)), rel=1e-6)
    for layer, loss in enumerate(swapped[:-1]):
        other = copy.deepcopy(model)
        layers = find_decoder_layers(other).module_list
        layers[layer], layers[layer + 1] = layers[layer + 1], layers[layer]
        assert loss == pytest.approx(math.log(references.perplexity(other, batch)), rel=1e-5)
    assert swapped[-1] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_of_two_kinds_are_not_swapped():
    _, swapped = measure_permutation_score(build("deepseek_v3"), [batch_for(build("deepseek_v3"))], PERPLEXITY)
    assert [loss is None for loss in swapped] == [False, True, False, True]  # two dense layers, two with experts
    with pytest.raises(ValueError, match="permutation_score: expected neighbouring layers of one kind, got none"):
        measure_permutation_score(build("gpt_oss"), [batch_for(build("gpt_oss"))], PERPLEXITY)


def output_of(layer, model, ids, x):
    """What a layer returns in the model's forward if its input is x."""
    seen = []

    def enter(module, args, kwargs):
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True)]
    handles.append(layer.register_forward_hook(lambda m, args, out: seen.append(out[0] if type(out) is tuple else out)))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen[0].flatten()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_jacobian_against_the_whole_matrix(family):
    model = build(family)
    batch = {"input_ids": torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(1))}
    found = measure_jacobian(model, [batch], n_probes=500)
    states = references.hidden_states(model, batch)
    for layer, value in enumerate(found):
        total, size = 0.0, 0
        for sample in range(2):
            x = states[layer][sample : sample + 1].float()
            run = partial(output_of, find_decoder_layers(model)[layer], model, batch["input_ids"][:1])
            J = torch.autograd.functional.jacobian(run, x).flatten(1)
            total, size = total + float((J - torch.eye(len(J))).square().sum()), size + len(J)
        assert value == pytest.approx(math.sqrt(total / size), rel=0.05)
    assert not [p for p in model.parameters() if not p.requires_grad or p.grad is not None]


def test_a_layer_that_does_nothing_is_the_identity():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    batch = batch_for(model, "left")
    assert measure_jacobian(model, [batch])[2] == pytest.approx(0, abs=1e-6)
    assert measure_causal_score(model, [batch])[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mpnet"])
def test_attention_sinks_against_the_models_own_attentions(family, padding):
    model = build(family)
    batch = batch_for(model, padding)
    before = model.config._attn_implementation
    shares, heads = measure_attention_sinks(model, [batch, batch])
    assert model.config._attn_implementation == before
    eager = build(family)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**batch, output_attentions=True).attentions
    mask = batch.get("attention_mask", torch.ones(3, 9)).bool()
    for layer, A in enumerate(weights):
        to_first, sinks = [], []
        for s in range(3):
            tokens = mask[s].nonzero().flatten().tolist()
            for h in range(A.shape[1]):
                a = sum(float(A[s, h, i, tokens[0]]) for i in tokens[1:]) / (len(tokens) - 1)
                to_first.append(a)
                sinks.append(float(a > 0.3))
        assert shares[layer] == pytest.approx(sum(to_first) / len(to_first), rel=1e-5)
        assert heads[layer] == pytest.approx(sum(sinks) / len(sinks))


def test_layers_without_attention():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("decoder/mamba")).eval()
    with pytest.raises(ValueError, match="attention_sinks: expected layers with attention weights"):
        measure_attention_sinks(model, [batch_for(model)])
    with pytest.raises(ValueError, match="at least two tokens"):
        measure_attention_sinks(build("llama"), [{"input_ids": torch.tensor([[3]])}])


def test_massive_activations():
    model = build("llama")
    batch = batch_for(model, "left")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] *= 1e5
    ratios, counts = measure_massive_activations(model, [batch, batch])
    for layer, state in enumerate(references.hidden_states(model, batch)[1:]):
        rows = [state[s][batch["attention_mask"][s].bool()].abs().flatten() for s in range(3)]
        medians = [sorted(row.tolist())[(len(row) - 1) // 2] for row in rows]
        pairs = list(zip(rows, medians, strict=True))
        assert ratios[layer] == pytest.approx(sum(float(r.max()) / m for r, m in pairs) / 3, rel=1e-5)
        assert counts[layer] == sum(int((r > max(100, 1000 * m)).sum()) for r, m in pairs) / 3
    assert counts[0] == 0 < counts[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_logit_lens_against_models_that_end_earlier(family):
    model = build(family)
    batch = batch_for(model, "right")
    intact, losses = measure_logit_lens(model, [batch], PERPLEXITY)
    assert losses[-1] == pytest.approx(intact, rel=1e-6)
    other = copy.deepcopy(model)
    for layer in range(len(losses) - 2, -1, -1):
        other = references.without_layer(other, layer + 1)
        assert losses[layer] == pytest.approx(math.log(references.perplexity(other, batch)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_all_or_a_reason(family, tmp_path):
    model = build(family)
    batch = batch_for(model)
    if family == "vit":
        batch["labels"] = torch.tensor([0, 1, 2])
    if family in ("bert", "mpnet"):
        batch["labels"] = batch["input_ids"].clone()
    report = diagnose(model, batches=[batch] * 2, metrics="all", output=tmp_path, show_progress=False)
    left_out = {note.split(" was left out")[0] for note in report.notes}
    there = {"massive_activations" if name == "massive_ratio" else name for name in report.layers}
    assert set(MORE_METRICS) == (there | left_out) & set(MORE_METRICS) and not there & left_out
    assert RunReport.load(tmp_path) == report and "Traceback" not in report.to_markdown()
    assert left_out & set(MORE_METRICS) <= {"logit_lens", "permutation_score"}
    assert report.results["rank_correlations"]["jacobian"] == pytest.approx(
        references_correlation(report.layers["layer_drop"], report.layers["jacobian"], report), abs=1e-9
    )


def references_correlation(drop, values, report):
    """Spearman's correlation for values without ties; 0 for a constant row."""
    sign = 1 if report.results["layer_drop"]["lower_is_better"] else -1
    if len(set(drop)) < len(drop):
        return report.results["rank_correlations"]["jacobian"]
    ranks = [[sorted(row).index(value) for value in row] for row in ([sign * d for d in drop], values)]
    n = len(drop)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def test_a_measure_by_name_fails_with_its_reason_and_all_leaves_it_out():
    model = build("bert_headless")
    with pytest.raises(ValueError, match="logit_lens: expected a model with a head, got BertModel"):
        diagnose(model, batches=[batch_for(model)], metrics=["logit_lens"], show_progress=False)
    with pytest.raises(ValueError, match="usefulness: expected at least two samples"):
        one = {"input_ids": torch.arange(3, 11)[None]}
        diagnose(build("llama"), batches=[one], metrics=["usefulness"], show_progress=False)
    with pytest.raises(ValueError, match="metrics: expected all alone"):
        diagnose(model, batches=[batch_for(model)], metrics=["all", "jacobian"], show_progress=False)
    report = diagnose(build("llama"), batches=[batch_for(build("llama"))], show_progress=False)
    assert not set(MORE_METRICS) & report.layers.keys(), "they are on request"


def test_a_finished_measure_is_not_computed_again(tmp_path, monkeypatch):
    model = build("llama")
    options = {"batches": [batch_for(model), batch_for(model)], "metrics": list(MORE_METRICS), "show_progress": False}
    first = diagnose(model, output=tmp_path, **options)

    def never(*args, **kwargs):
        raise AssertionError("measured twice")

    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    again = diagnose(model, output=tmp_path, **options)
    handle.remove()
    assert again.layers == first.layers and again.results == first.results
    # The probes that find out whether layers are independent are known by now; nothing else runs the model.
    assert not calls
    other = diagnose(model, output=tmp_path, seed=1, **options)
    assert other.layers["jacobian"] != first.layers["jacobian"]
    assert other.layers["causal_score"] == first.layers["causal_score"]


def test_layers_that_run_several_times_have_the_measures_that_need_no_order(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("encoder/albert")).eval()
    report = diagnose(model, batches=[batch_for(model)], metrics="all", show_progress=False)
    assert {"jacobian", "attention_sinks", "massive_ratio"} <= report.layers.keys()
    assert any(note.startswith("causal_score was left out") for note in report.notes)
