"""Layers that a model runs several times in one forward pass, or that return something else than their hidden state."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from examples.tiny_architectures import tiny_config
from hf_cod import (
    HealSettings,
    LayerMonitor,
    OwlBnbConfig,
    OwLoreAdamW,
    OwLoreConfig,
    collect_statistics,
    diagnose,
    drop_layers,
    factorize,
    find_decoder_layers,
    heal,
    narrow,
    plan_depth,
    plan_ranks,
    prune,
    quantize,
    score_layers,
    skip,
)
from hf_cod.layers.input_gradients import require_input_gradients
from hf_cod.layers.layer_calls import SEVERAL_TIMES
from tests.tiny_models import batch_for, build, outputs

SEVERAL = "expected layers that run once in a forward pass, got model.layers.0 of LlamaForCausalLM, which runs"


class Looped(nn.ModuleList):
    """Layers over which a model iterates twice, as models that loop over depth do."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return [*found, *found] if isinstance(index, slice) else found


def looped():
    model = build("llama")
    model.model.layers = Looped(model.model.layers)
    return model


def reversible(auto=AutoModelForCausalLM, kind="reformer"):
    """Its layers return two streams by name, and its forward pass records no gradients of them."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.num_hidden_layers = 2
    return auto.from_config(config).eval()


RUNNING = {
    "scores": lambda model, batches: score_layers(model, batches=batches, method="auto"),
    "plan_depth": lambda model, batches: plan_depth(model, 1, "search", batches=batches),
    "replacement": lambda model, batches: drop_layers(model, [1], "linear", batches=batches),
}
# What runs the whole model for each layer where its layers do not run alone.
WHOLE = {
    "statistics": lambda model, batches: collect_statistics(model, batches),
    "wanda": lambda model, batches: prune(model, 0.5, "wanda", batches=batches),
    "sparsegpt": lambda model, batches: prune(model, 0.5, "sparsegpt", batches=batches),
    "quantize": lambda model, batches: quantize(model, OwlBnbConfig(bits=4), batches=batches),
    "factorize": lambda model, batches: factorize(model, 0.9, "whitened", batches=batches),
    "spectra": lambda model, batches: plan_ranks(model, 0.9, "spectrum", batches=batches),
}


@pytest.mark.parametrize("do", RUNNING.values(), ids=RUNNING)
def test_layers_that_run_several_times_are_refused_before_any_change(do):
    model = looped()
    before, batches = copy.deepcopy(model.state_dict()), [batch_for(model)]
    with pytest.raises(ValueError, match=SEVERAL):
        do(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("do", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("make", [lambda: looped(), lambda: reversible()], ids=["looped", "reversible"])
def test_the_whole_model_runs_for_each_of_them(make, do):
    model = make()
    report = do(model, [batch_for(model)])
    assert outputs(model).isfinite().all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if hasattr(report, "notes"):
        assert [note for note in report.notes if note.startswith("the whole model was run for each layer: ")]


def test_a_layer_that_runs_several_times_has_the_inputs_of_all_its_runs():
    model, batch = looped(), batch_for(build("llama"))
    seen = []
    handle = model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = collect_statistics(model, [batch])
    handle.remove()
    assert len(seen) == 2 and not torch.equal(*seen)
    expected = sum(x.double().square().flatten(0, 1).sum(0) for x in seen)
    torch.testing.assert_close(found.squares["model.layers.1.mlp.gate_proj"].double(), expected, rtol=1e-5, atol=0)


def test_heads_and_channels_of_layers_that_run_several_times():
    model = looped()
    intact = copy.deepcopy(model)
    narrow(model, 0.9, batches=[batch_for(model)], channel_multiple=8)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in intact.parameters())
    assert outputs(model).isfinite().all()


def test_training_is_watched_with_means_over_the_runs():
    model, batch = looped(), batch_for(looped())
    watched = LayerMonitor(model, probe=[batch]).measure(0)
    found = diagnose(model, batches=[batch], metrics=["angular_distance", "output_variance"]).layers
    assert all(watched[name] == pytest.approx(found[name]) for name in ("angular_distance", "variance"))


def test_layers_that_run_several_times_are_named():
    with pytest.raises(ValueError, match=f"{SEVERAL} again; {SEVERAL_TIMES}"):
        plan_depth(looped(), 1, batches=[batch_for(looped())])


def test_hidden_states_are_matched_on_layers_that_run_once():
    student, teacher = looped(), build("llama")
    windows = torch.randint(3, 99, (8, 9), generator=torch.Generator().manual_seed(0))
    how = HealSettings("full", steps=1, batch_size=2, micro_batch_size=2, sequence_length=9, eval_samples=2)
    with pytest.raises(ValueError, match="expected layers that run once in a forward pass"):
        heal(student, teacher, windows, replace(how, hidden_weight=1.0))


def test_no_matrix_that_can_be_changed():
    """SqueezeBERT's layers are convolutions; the matrices of I-BERT return their scales as well."""
    from peft import get_peft_model

    convolutions = AutoModelForMaskedLM.from_config(tiny_config("encoder/squeezebert")).eval()
    for change in (
        lambda model: prune(model, 0.5, "magnitude"),
        lambda model: prune(model, 0.5, "wanda", batches=[batch_for(model)]),
        lambda model: quantize(model, OwlBnbConfig(bits=4)),
        lambda model: factorize(model, 0.9, "plain"),
    ):
        with pytest.raises(ValueError, match=r"expected matrices in the layers of SqueezeBertForMaskedLM .*, got none"):
            change(convolutions)
    for model, why in (
        (convolutions, "got none$"),
        (AutoModelForMaskedLM.from_config(tiny_config("encoder/ibert")), "got none: a QuantLinear, whose output is"),
    ):
        with pytest.raises(
            ValueError, match=rf"target_modules: expected matrices of the layers that can get adapters, {why}"
        ):
            get_peft_model(model, OwLoreConfig(r=4))


def test_what_runs_no_single_layer_works_on_loops():
    model = looped()
    intact = outputs(model)
    with skip(model, 1):
        assert not torch.equal(outputs(model), intact)
    assert torch.equal(outputs(model), intact)
    assert prune(model, 0.5, "magnitude").results["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "do",
    [
        *(RUNNING[name] for name in ("plan_depth", "replacement")),
        lambda model, batches: diagnose(model, batches=batches, metrics=["layer_drop"]),
    ],
    ids=["plan_depth", "replacement", "layer_drop"],
)
def test_layers_that_return_their_streams_by_name_are_refused(do):
    model = reversible()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"first in a tuple, got .* ReformerOutput of hidden_states, attn_output"):
        do(model, [batch_for(model)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradients_of_other_models_begin_where_they_did():
    model = build("llama")
    require_input_gradients(find_decoder_layers(model))
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("adapters", [False, True])
def test_layers_without_recorded_gradients_train(adapters):
    """The sampled layer gets the gradients that it has if everything trains."""
    model = reversible().train()
    batch = {**batch_for(model), "labels": batch_for(model)["input_ids"]}
    full = copy.deepcopy(model)
    full(**batch).loss.backward()
    if adapters:
        from peft import get_peft_model

        trained, ranks = get_peft_model(model, OwLoreConfig(r=4, task_type="CAUSAL_LM")).train(), {}
    else:
        trained, ranks = model, {"rank": 4}
    optimizer = OwLoreAdamW(trained, lr=1e-2, n_active=1, **ranks)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    trained(**batch).loss.backward()
    if not adapters:
        expected = dict(full.named_parameters())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".layers." in name}
        assert found and all(torch.equal(gradient, expected[name].grad) for name, gradient in found.items())
    optimizer.step()
    optimizer.zero_grad()
    trained(**batch).loss.backward()  # the first step of an adapter sets its basis
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in trained.named_parameters() if ".layers." in name)
    optimizer.release()
    assert not model.get_input_embeddings()._forward_hooks


def tokens_first(kind):
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind == "xlnet" else AutoModelForSeq2SeqLM
    return auto.from_config(tiny_config(kind)).eval()


def with_padding(kind, samples, tokens):
    ids = torch.randint(5, 80, (samples, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, : tokens // 2] = 0
    decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if kind != "xlnet" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


@pytest.mark.parametrize("tokens", [7, 3])
@pytest.mark.parametrize("kind, stack", [("xlnet", None), ("seq2seq/fsmt", "encoder"), ("seq2seq/fsmt", "decoder")])
def test_hidden_states_with_the_tokens_first(kind, stack, tokens):
    """Also of a batch with as many tokens as samples, whose shape does not say which are first."""
    model = tokens_first(kind)
    model.config.use_cache = False  # with a cache FSMT reads later tokens, too
    batch = with_padding(kind, 3, tokens)
    layers, real = find_decoder_layers(model, stack), batch["attention_mask"].mT.flatten().bool()
    name, matrix = next(
        (n, m) for n, m in layers.linears(0).items() if type(m) is nn.Linear and "encoder_attn" not in n
    )
    states, rows = [], []
    handles = [
        layers[1].register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True),
        layers[0].register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True),
        matrix.register_forward_pre_hook(
            lambda _, args, kwargs: rows.extend([*args, *kwargs.values()][:1]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    before, after = (state[-1].double() for state in states)
    expected = torch.nn.functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1).arccos() / torch.pi
    found = diagnose(model, batches=[batch], stack=stack, metrics=["angular_distance"], show_progress=False)
    assert found.layers["angular_distance"][0] == pytest.approx(float(expected.mean()), abs=1e-6)
    if kind == "xlnet":  # its attention is a bank of 3-D weights, whose inputs are not seen
        return
    squares = collect_statistics(model, [batch], stack=stack).squares[name]
    torch.testing.assert_close(squares, rows[0].flatten(0, -2)[real].double().square().sum(0), rtol=1e-5, atol=1e-6)
