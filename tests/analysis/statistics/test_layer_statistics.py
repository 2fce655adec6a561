import math

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from hf_cod import LayerStatistics, collect_statistics, find_decoder_layers
from tests import references
from tests.tiny_models import OTHERS, batch_for, build

PLAIN = ["llama", "llama_tied", "gpt2", "opt", "gemma3", "bert", "vit"]


def two_batches(model, padding=None):
    return [batch_for(model, padding), {name: tensor[:2] for name, tensor in batch_for(model).items()}]


def assert_same(a, b, rtol=1e-6):
    assert a.squares.keys() == b.squares.keys()
    for name in a.squares:
        torch.testing.assert_close(a.squares[name], b.squares[name], rtol=rtol, atol=0)
        assert torch.equal(a.tokens[name], b.tokens[name]), name


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", PLAIN)
def test_sums_against_stored_inputs(family, padding):
    model = build(family, layers=2)
    batches = two_batches(model, padding)
    found = collect_statistics(model, batches)
    names = set()
    for index in range(2):
        for name, (_, X) in references.linear_inputs(model, batches, index).items():
            torch.testing.assert_close(found.squares[name], X.double().square().sum(0), rtol=1e-6, atol=0)
            assert found.tokens[name] == len(X)
            names.add(name)
    assert names == set(found.squares) and not found.unseen


@pytest.mark.parametrize("padding", [None, "right"])
def test_experts_count_the_tokens_routed_to_them(padding):
    model = build("mixtral", layers=1)
    batch = batch_for(model, padding)
    found = collect_statistics(model, [batch])
    bank = model.model.layers[0].mlp.experts
    calls = []
    handle = bank.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    hidden, index, _ = calls[0]
    real = batch["attention_mask"].bool().flatten()
    prefix = "model.layers.0.mlp.experts"
    for expert in range(4):
        x = hidden[(index == expert).any(-1) & real]
        torch.testing.assert_close(
            found.squares[f"{prefix}.gate_up_proj"][expert], x.double().square().sum(0), rtol=1e-6, atol=0
        )
        gate, up = (x @ bank.gate_up_proj[expert].T).chunk(2, -1)
        inner = (nn.functional.silu(gate) * up).detach()
        torch.testing.assert_close(
            found.squares[f"{prefix}.down_proj"][expert], inner.double().square().sum(0), rtol=1e-5, atol=0
        )
        assert found.tokens[f"{prefix}.down_proj"][expert] == len(x)
    assert found.tokens[f"{prefix}.down_proj"].sum() == 2 * real.sum()


def test_experts_never_seen_are_reported():
    model = build("mixtral", layers=1, num_local_experts=12, num_experts_per_tok=1)
    found = collect_statistics(model, [{"input_ids": torch.tensor([[5, 6, 7]])}])
    unseen = found.unseen["model.layers.0.mlp.experts.down_proj"]
    assert len(unseen) >= 9 and "model.layers.0.self_attn.q_proj" not in found.unseen
    assert (found.squares["model.layers.0.mlp.experts.down_proj"][unseen] == 0).all()


def test_bfloat16_is_summed_wide():
    model = build("llama", layers=1, dtype=torch.bfloat16)
    batch = batch_for(model)
    found = collect_statistics(model, [batch])
    for name, (_, X) in references.linear_inputs(model, [batch], 0).items():
        torch.testing.assert_close(found.squares[name], X.double().square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parts_merge_to_the_whole_and_survive_a_file(family, tmp_path):
    model = build(family, layers=2)
    batches = two_batches(model, "left")
    whole = collect_statistics(model, batches, name="mine")
    parts = [collect_statistics(model, [batch], name="mine") for batch in batches]
    merged = LayerStatistics.merge([LayerStatistics.load(p.save(tmp_path / f"{i}")) for i, p in enumerate(parts)])
    assert_same(merged, whole, rtol=1e-12)
    assert (merged.model, merged.layers_path) == ("mine", "model.layers")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_models(family, offload, tmp_path):
    expected = collect_statistics(build(family), [batch_for(build(family))])
    model = build(family)
    if offload == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert_same(collect_statistics(model, [batch_for(model)]), expected)


def test_peft_adapters_are_inside_but_not_counted():
    plain = build("llama")
    expected = collect_statistics(plain, [batch_for(plain)])
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules="all-linear"))
    assert_same(collect_statistics(wrapped, [batch_for(plain)]), expected)


def test_the_model_is_left_as_it_was():
    model = build("mixtral").train()
    collect_statistics(model, [batch_for(model)])
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_head_is_not_run():
    model = build("llama")
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("head"))
    collect_statistics(model, [batch_for(model)])
    assert calls == []
    model(**batch_for(model))
    assert calls == ["head"]  # the hook would have told


def test_refusals(tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        collect_statistics(model, [])
    hook = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(
        ValueError, match=r"activations: .* first at the input of model.layers.2.mlp.down_proj, batch 0"
    ):
        collect_statistics(model, [batch_for(model)])
    hook.remove()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"weights: .* NaN or infinity in model.layers.2.mlp.up_proj"):
        collect_statistics(model, [batch_for(model)])
    shared = build("llama")
    shared.model.layers[3].mlp.up_proj = shared.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"one layer each, got model.layers.3.mlp.up_proj also in layer 1"):
        collect_statistics(shared, [batch_for(shared)])
    masked = {**batch_for(shared), "attention_mask": torch.ones(3, 1, 9, 9).tril()}
    with pytest.raises(ValueError, match=r"attention_mask: expected \(samples, tokens\).* got shape \(3, 1, 9, 9\)"):
        collect_statistics(build("llama"), [masked])
    with pytest.raises(ValueError, match="parts: expected at least one"):
        LayerStatistics.merge([])
    (tmp_path / "text").write_text("no")
    for path in (tmp_path / "text", tmp_path / "none"):
        with pytest.raises(ValueError, match="statistics: expected a file of statistics"):
            LayerStatistics.load(path)


def test_statistics_of_another_model():
    llama, wide, bert = build("llama"), build("llama", intermediate_size=64), build("bert")
    found = collect_statistics(llama, [batch_for(llama)])
    with pytest.raises(ValueError, match=r"statistics: .*down_proj \(64,\), got those of .*down_proj \(48,\)"):
        found.check(find_decoder_layers(wide))
    with pytest.raises(ValueError, match=r"statistics: expected those of BertForMaskedLM.*absent"):
        found.check(find_decoder_layers(bert))
    with pytest.raises(ValueError, match="parts: expected"):
        LayerStatistics.merge([found, collect_statistics(wide, [batch_for(wide)])])
    other = collect_statistics(build("llama"), [batch_for(llama)], name="other")
    with pytest.raises(ValueError, match=r"parts: expected those of one model, got .*LlamaForCausalLM .* and other"):
        LayerStatistics.merge([found, other])
    deeper = build("llama", layers=5)
    with pytest.raises(ValueError, match=r"model.layers.4.* got those of"):
        found.check(find_decoder_layers(deeper))


@pytest.mark.parametrize("family", OTHERS)
def test_encoders_and_vision_models(family):
    model = build(family)
    found = collect_statistics(model, [batch_for(model)])
    found.check(find_decoder_layers(model))
    assert not found.unseen and all((squares > 0).any() for squares in found.squares.values())
