"""Layers in whose place stands a linear map, against modules that are put into the model, with maps by lstsq."""

import copy

import pytest
import torch
from torch import nn

from hf_cod import find_decoder_layers
from hf_cod.analysis.diagnostics.usefulness import measure_usefulness
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.functional.depth import usefulness
from tests import references
from tests.tiny_models import batch_for, build


class Linear(nn.Module):
    """In the place of a layer; attributes that the model reads are those of the layer."""

    def __init__(self, layer, T):
        super().__init__()
        self.layer, self.T = [layer], T

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("T", "_modules", "_parameters") else getattr(self.layer[0], name)

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states.double() @ self.T).to(hidden_states.dtype)


@torch.no_grad()
def hidden_states(model, batch, layer):
    """(tokens, d) before and after a layer, without padding, by hooks."""
    seen = []

    def hook(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        seen.extend([before, output[0] if isinstance(output, tuple) else output])

    handle = find_decoder_layers(model)[layer].register_forward_hook(hook, with_kwargs=True)
    model(**batch)
    handle.remove()
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else ...
    return [state[keep].reshape(-1, state.shape[-1]).double() for state in seen]


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_losses_with_maps_against_a_model_that_has_them(family):
    model = build(family)
    fitting, batch = batch_for(model, "left"), batch_for(model, "right")
    fitting["input_ids"] = fitting["input_ids"].roll(1, 0)
    intact, replaced = measure_usefulness(model, [fitting], [batch], find_metric(None, "causal_lm"))
    assert intact == pytest.approx(torch.tensor(references.perplexity(model, batch)).log().item(), rel=1e-6)
    for layer, loss in enumerate(replaced):
        x, z = hidden_states(model, fitting, layer)
        H = x.T @ x
        T = torch.linalg.solve(H + 1e-6 * H.diagonal().mean() * torch.eye(len(H)), x.T @ (z - x)) + torch.eye(len(H))
        other = copy.deepcopy(model)
        stack = find_decoder_layers(other)
        stack.module_list[layer] = Linear(stack[layer], T)
        assert loss == pytest.approx(torch.tensor(references.perplexity(other, batch)).log().item(), rel=1e-5)


def test_a_layer_that_is_linear_has_no_use():
    """Its map is exact where there are more tokens than channels."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    batches = [batch_for(model) for _ in range(2)]
    intact, replaced = measure_usefulness(model, batches, batches, find_metric(None, "causal_lm"))
    assert replaced[1] == pytest.approx(intact, rel=1e-5) and replaced[2] == pytest.approx(intact, rel=1e-5)


def test_images():
    model = build("vit")
    batch = batch_for(model)
    intact, replaced = measure_usefulness(model, [batch], [batch], find_metric(None, "headless"))
    assert intact == pytest.approx(0, abs=1e-6) and all(0 <= loss < 1 for loss in replaced)


def test_the_share_of_useful_layers():
    assert usefulness(2.0, torch.tensor([2.1, 2.3, 5.0, 1.0])) == 0.5
    assert usefulness(2.0, torch.tensor([2.1, 2.3, 5.0, 1.0]), threshold=0.01) == 0.75
