"""Scores of single experts against naive code, in each way that models run experts."""

import pytest
import torch
from accelerate import disk_offload

from hf_cod import ExpertScores, SampleSettings, collect_statistics, find_decoder_layers, score_experts
from hf_cod.scoring.expert_methods import METHODS
from tests import references
from tests.layers.test_expert_routing import with_lists
from tests.tiny_models import MIXTURE_TYPES, batch_for, build, build_mixture, two_batches
from tests.tiny_tokenizers import gpt_like


@pytest.mark.parametrize("kind", MIXTURE_TYPES)
def test_scores_against_naive_code(kind):
    model = build_mixture(kind)
    batch = batch_for(model, "left" if kind in ("mixtral", "llama4_text", "dbrx", "jetmoe") else None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    naive = references.expert_scores(model, batch, threshold=2.0)
    for method in METHODS:
        options = {"threshold": 2.0} if method == "owl" else {}
        found = score_experts(model, method=method, batches=[batch], **options)
        assert found.values.keys() == naive[method].keys() and found.settings == options
        for name, values in found.values.items():
            assert values == pytest.approx(naive[method][name], rel=1e-4, abs=1e-6), (method, name)
            assert len(values) == len(found.tokens[name]) == len(found.parameters[name])
        found.check(find_decoder_layers(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe"])
def test_frequencies_add_up_to_the_experts_of_a_token(kind):
    found = score_experts(build_mixture(kind), method="frequency", batches=two_batches(build("llama"), "right"))
    assert all(sum(values) == pytest.approx(2) for values in found.values.values())


def test_several_batches_are_one():
    model = build_mixture("mixtral")
    batch = batch_for(model)
    parts = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
    for method in METHODS:
        one, three = (score_experts(model, method=method, batches=given) for given in ([batch], parts))
        assert one.tokens == three.tokens
        for name in one.values:
            assert one.values[name] == pytest.approx(three.values[name], rel=1e-4, abs=1e-6)


def test_texts_and_saved_statistics():
    model, tokenizer = build_mixture("mixtral"), gpt_like()
    texts = ["three four five six " * 20]
    samples = SampleSettings(sequence_length=8, max_samples=4)
    found = score_experts(model, tokenizer=tokenizer, texts=texts, samples=samples)
    assert found.method == "reap" and sum(found.tokens["model.layers.0.mlp.experts"]) == 2 * 8 * 4
    batch = batch_for(model)
    statistics = collect_statistics(model, [batch])
    with_them = score_experts(model, statistics, "owl", batches=[batch])
    assert with_them == score_experts(model, method="owl", batches=[batch])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_offloaded_experts(kind, tmp_path):
    model = build_mixture(kind)
    batches = [batch_for(model)]
    expected = {method: score_experts(model, method=method, batches=batches) for method in METHODS}
    disk_offload(model, tmp_path)
    for method, scores in expected.items():
        assert score_experts(model, method=method, batches=batches) == scores


def test_half_precision():
    expected, model = build_mixture("jetmoe"), build_mixture("jetmoe").to(torch.float16)
    batches = [batch_for(model)]
    found = score_experts(model, batches=batches).values
    for name, values in score_experts(expected, batches=batches).values.items():
        assert found[name] == pytest.approx(values, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_a_token(method):
    model = build_mixture("mixtral", num_local_experts=12, num_experts_per_tok=1)
    found = score_experts(model, method=method, batches=[batch_for(model)])
    name = "model.layers.0.mlp.experts"
    assert 0 < len(found.unseen[name]) < 12
    assert all(found.values[name][expert] == 0 == found.tokens[name][expert] for expert in found.unseen[name])
    seen = [value for expert, value in enumerate(found.values[name]) if expert not in found.unseen[name]]
    assert all(value > 0 for value in seen) or method == "owl"


def test_layers_without_experts_have_no_scores():
    found = score_experts(build_mixture("deepseek_v3"), method="frequency", batches=[batch_for(build("llama"))])
    assert list(found.layers.values()) == [1, 2, 3], "the first layer is dense, and shared experts are not scored"
    found = score_experts(build_mixture("inkling_text"), method="frequency", batches=[batch_for(build("llama"))])
    assert not [name for name in found.values if "shared" in name]


def test_lists_of_experts():
    model = with_lists()
    batch = batch_for(model)
    for method in METHODS:
        found = score_experts(model, method=method, batches=[batch])
        assert list(found.values) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
        assert all(len(values) == 3 for values in found.values.values())
    x = []
    model.model.layers[0].mlp.experts[1].register_forward_hook(lambda m, args, out: x.append(out.norm(dim=-1)))
    frequency = score_experts(model, method="frequency", batches=[batch]).values["model.layers.0.mlp.experts"]
    assert frequency[1] == len(x[0]) / 27


def test_without_gate_weights_some_methods_are_refused():
    model = with_lists("mixed")
    for method in ("reap", "router_weight"):
        said = rf"method: expected frequency or owl for LlamaForCausalLM, whose gate weights .*, got {method}$"
        with pytest.raises(ValueError, match=said):
            score_experts(model, method=method, batches=[batch_for(model)])
    for method in ("frequency", "owl"):
        assert score_experts(model, method=method, batches=[batch_for(model)]).values
    with pytest.raises(ValueError, match=r"attention_mask: expected none for model.layers.0.mlp.experts, whose tokens"):
        score_experts(model, method="frequency", batches=[batch_for(model, "right")])


def test_bad_input():
    mixture, dense = build_mixture("mixtral"), build("llama")
    batches = [batch_for(mixture)]
    with pytest.raises(ValueError, match="model: expected a mixture of experts, got LlamaForCausalLM, whose layers"):
        score_experts(dense, batches=batches)
    with pytest.raises(ValueError, match="method: expected one of reap, router_weight, frequency, owl, got 'best'"):
        score_experts(mixture, method="best", batches=batches)
    with pytest.raises(ValueError, match="threshold: expected none with method reap, which does not use it, got 3"):
        score_experts(mixture, batches=batches, threshold=3.0)
    with pytest.raises(ValueError, match="threshold: expected a finite number above 0, got -1"):
        score_experts(mixture, method="owl", batches=batches, threshold=-1.0)
    with pytest.raises(ValueError, match="batches: expected batches, or tokenizer and texts, for the method reap, got"):
        score_experts(mixture)
    other = collect_statistics(build_mixture("mixtral", num_local_experts=3), batches)
    with pytest.raises(ValueError, match="statistics: expected"):
        score_experts(mixture, other, "owl", batches=batches)
    with torch.no_grad():
        mixture.model.layers[1].mlp.experts.down_proj[0] = float("nan")
    with pytest.raises(ValueError, match=r"finite numbers, got NaN or infinity in model.layers.1.mlp.experts"):
        score_experts(mixture, batches=batches)


def test_scores_are_saved_and_read(tmp_path):
    model = build_mixture("jetmoe")
    found = score_experts(model, method="owl", threshold=3.0, batches=[batch_for(model)])
    found.save(tmp_path / "expert_scores.json")
    assert ExpertScores.load(tmp_path / "expert_scores.json") == found
