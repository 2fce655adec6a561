"""What errors in a matrix's output cost the loss: against autograd by hand, and against errors that are made."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from examples.tiny_architectures import build as build_type
from hf_cod import find_decoder_layers, perplexity, plan_ranks, score_layers
from hf_cod.analysis.statistics.output_gradients import measure_loss_weights
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import SampleSettings, token_batches
from tests.tiny_models import batch_for, build, two_batches
from tests.tiny_training import silenced


def by_hand(model, batches):
    """Through the whole graph, weights included, one matrix at a time."""
    stack = find_decoder_layers(model)
    names = [name for index in range(len(stack)) for name in stack.linears(index)]
    sums = {name: [0.0, 0.0, 0.0, 1] for name in names}
    predictions = 0
    for batch in batches:
        outputs = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, y, name=name, outputs=outputs: outputs.update({name: y})
            )
            for name in names
        ]
        logits = model.eval()(**batch).logits
        for handle in handles:
            handle.remove()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        labels = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
        predictions += int((labels != -100).sum())
        for name, y in outputs.items():
            (g,) = torch.autograd.grad(loss, y, retain_graph=True)
            bias = getattr(model.get_submodule(name), "bias", None)
            plain = (y if bias is None else y - bias).flatten(0, -2)[mask.bool().flatten()].detach()
            found = sums[name]
            found[0] += float(g.square().sum())
            found[1] += float(plain.square().sum())
            found[2] += len(plain)
            found[3] = y.shape[-1]
    return {name: 0.5 * g / predictions / m * y / n for name, (g, y, n, m) in sums.items()}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
def test_against_autograd(family, padding):
    model = build(family, layers=3, dtype=torch.float64)
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    batches = [batch_for(model, padding), {k: v[:2] for k, v in batch_for(model).items()}]
    found = measure_loss_weights(find_decoder_layers(model), batches)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    expected = by_hand(model.requires_grad_(True), batches)
    assert found == pytest.approx(expected, rel=1e-9) and min(found.values()) > 0


def test_outputs_whose_gradient_is_zero():
    """A block that adds nothing yet: no gradient reaches what stands before its last matrices."""
    model = silenced(build("llama"), 1)
    batches = [batch_for(model)]
    found = measure_loss_weights(find_decoder_layers(model), batches)
    dead = [name for name, cost in found.items() if cost == 0]
    assert sorted(dead) == sorted(name for name in found if ".layers.1." in name)
    assert found == pytest.approx(by_hand(model.requires_grad_(True), batches), rel=1e-4)


def test_scores_and_ranks_of_a_model_with_a_silent_block():
    model = silenced(build("llama"), 1)
    batches = two_batches(model)
    fisher = score_layers(model, method="fisher", batches=batches).values
    assert fisher[1] == min(fisher) and math.isfinite(fisher[1])
    assert score_layers(model, method="auto", batches=batches).settings["chosen"]
    ranks = plan_ranks(model, 0.6, batches=batches).ranks
    assert all(ranks[name] == 1 for name in ranks if ".layers.1." in name)


def test_matrices_whose_cost_is_not_known():
    """Indexers run without gradients: ranks by the mean of their layer."""
    model, part = build_type("deepseek_v32"), ".indexer."
    batches = two_batches(model)
    stack = find_decoder_layers(model)
    found = measure_loss_weights(stack, batches)
    names = [name for index in range(len(stack)) for name in stack.linears(index)]
    assert sorted(set(names) - found.keys()) == sorted(name for name in names if part in name)
    assert all(math.isfinite(score) for score in score_layers(model, method="fisher", batches=batches).values)
    whole = {name: min(shape) for index in range(len(stack)) for name, shape in stack.input_shapes(index).items()}
    ranks = plan_ranks(model, 0.95, batches=batches).ranks
    assert [name for name in names if part in name and ranks.get(name, whole[name]) > 1]


def test_a_product_is_found_among_several_outputs():
    """I-BERT's matrices return a product and the scale of its quantization, Llama 4's routers scores and logits."""
    routed = build_type("llama4_text")
    costs = measure_loss_weights(find_decoder_layers(routed), two_batches(routed))
    assert all(costs[name] > 0 for name, _ in routed.named_modules() if name.endswith(".router"))
    model = build_type("encoder/ibert")
    stack = find_decoder_layers(model)
    batch = {"input_ids": batch_for(model)["input_ids"]}
    batch["labels"] = batch["input_ids"]
    found = measure_loss_weights(stack, [batch])
    name = next(iter(stack.linears(1)))
    ((y, gradient),) = _outputs_and_gradients(model, batch, name)
    y = y - model.get_submodule(name).bias
    expected = 0.5 * gradient.square().sum() / batch["labels"].numel() / y.shape[-1] * y.square().sum(-1).mean()
    assert found[name] == pytest.approx(float(expected), rel=1e-5) and min(found.values()) > 0
    with (
        pytest.raises(ValueError, match=r"^model: expected a matrix whose product has a gradient in layer 0, got none"),
        _other_outputs(stack),
    ):
        measure_loss_weights(stack, [batch])


def _outputs_and_gradients(model, batch, name):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: found.append(out[0]))
    loss = model.eval()(**batch).loss * batch["labels"].numel()
    handle.remove()
    return [(y.detach(), torch.autograd.grad(loss, y)[0]) for y in found]


@contextmanager
def _other_outputs(stack):
    """Within the block no output of the matrices of the first layer is their product."""
    modules = stack.linears(0).values()
    handles = [m.register_forward_hook(lambda _, args, out: (2 * out[0], *out[1:])) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_two_tokens():
    model = build("llama")
    found = measure_loss_weights(find_decoder_layers(model), [{"input_ids": torch.tensor([[3, 4]])}])
    assert all(math.isfinite(cost) for cost in found.values())


def test_bfloat16_and_one_layer():
    model = build("llama", layers=1)
    batches = [batch_for(model)]
    exact = measure_loss_weights(find_decoder_layers(model), batches)
    found = measure_loss_weights(find_decoder_layers(model.bfloat16()), batches)
    assert found == pytest.approx(exact, rel=0.2)


def test_models_without_a_loss():
    model = build("llama").model
    with pytest.raises(
        ValueError, match="batches: expected a loss and floating-point weights in memory, got none: LlamaMod"
    ):
        measure_loss_weights(find_decoder_layers(model), [batch_for(model)])


@pytest.mark.parametrize("method", ["fisher", "gradient_norm"])
def test_layers_whose_gradients_are_not_recorded_are_refused(method):
    """Reformer's layers are reversible: its own backward pass runs only if their input requires a gradient."""
    model = build_type("reformer")
    with pytest.raises(ValueError, match=r"^\w+: expected layers whose gradients are recorded, got those of Reformer"):
        score_layers(model, method=method, batches=[batch_for(model)])
    assert all(p.grad is None for p in model.parameters())


def test_it_tells_what_errors_cost(smollm2, brown_text):
    """Noise of 4 % of the energy in one matrix at a time; with either sign, because the linear term is left out. Not of
    keys: what is added to all of them alike changes no softmax.
    """
    model, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
    batches = token_batches(tokenizer, brown_text, SampleSettings(sequence_length=64, max_samples=4, batch_size=4))
    found = measure_loss_weights(find_decoder_layers(model), batches)
    names = sorted((name for name in found if "k_proj" not in name), key=lambda name: found[name])
    names = names[:: len(names) // 6]
    intact = math.log(perplexity(model, batches))
    for name in names:
        losses = [math.log(perplexity_with(noise, model, name, batches)) for noise in (0.2, -0.2)]
        growth = sum(losses) / 2 - intact
        assert 0.4 < growth / (0.04 * found[name]) < 1.5, (name, growth, found[name])


def perplexity_with(noise, model, name, batches):
    def disturb(module, args, y):
        disturbance = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        return y + disturbance * (noise * y.norm() / disturbance.norm())

    handle = model.get_submodule(name).register_forward_hook(disturb)
    found = perplexity(model, batches)
    handle.remove()
    return found
