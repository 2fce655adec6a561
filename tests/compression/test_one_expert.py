"""A mixture with one expert computes what a model with an MLP computes, and methods do the same to both."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from hf_cod import OwlBnbConfig, drop_experts, factorize, narrow, prune, quantize
from tests.tiny_models import build_mixture


def pair(dtype=torch.float32):
    """(mixture, dense model) of the same weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    mixture = build_mixture("mixtral", num_local_experts=1, num_experts_per_tok=1, **sizes)
    known = {n: v for n, v in mixture.config.to_dict().items() if n in MistralConfig().to_dict() and "type" not in n}
    dense = MistralForCausalLM(MistralConfig(**known)).eval()
    for place, layer in enumerate(dense.model.layers):
        bank = mixture.model.layers[place].mlp.experts
        state = {n: t for n, t in mixture.model.layers[place].state_dict().items() if ".experts." not in n}
        gate, up = bank.gate_up_proj[0].detach().chunk(2)
        state |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": bank.down_proj[0]}
        layer.load_state_dict({n: t for n, t in state.items() if "mlp.gate.weight" not in n})
    for name in ("embed_tokens", "norm"):
        getattr(dense.model, name).load_state_dict(getattr(mixture.model, name).state_dict())
    dense.lm_head.load_state_dict(mixture.lm_head.state_dict())
    return mixture.to(dtype), dense.to(dtype)


def tokens():
    return {"input_ids": torch.randint(3, 99, (8, 40), generator=torch.Generator().manual_seed(2))}


@torch.no_grad()
def logits(model):
    return model(**tokens()).logits


# Those that treat rows, or blocks of a row, on their own: gate and up are one matrix of a bank, and two of an MLP.
ROW_BY_ROW = {
    "wanda": lambda model: prune(model, 0.5, "wanda", batches=[tokens()]),
    "magnitude": lambda model: prune(model, "2:4", "magnitude"),
    "nearest": lambda model: quantize(model, OwlBnbConfig(bits=3, block=32, double_quant=False)),
}
# Products of the tokens of an expert are shrunk, as an expert may have few.
CHANGES = {
    **ROW_BY_ROW,
    "sparsegpt": lambda model: prune(model, 0.5, "sparsegpt", batches=[tokens()]),
    "compensated": lambda model: quantize(model, OwlBnbConfig(bits=4, block=32), batches=[tokens()]),
    "whitened": lambda model: factorize(model, 0.75, batches=[tokens()]),
    "narrowed": lambda model: narrow(model, 0.75, channel_multiple=8, batches=[tokens()]),
    "dropped": lambda model: drop_experts(model, 0.5, batches=[tokens()]),
}


@pytest.mark.parametrize("change", ROW_BY_ROW)
def test_the_same_as_an_mlp(change):
    models = pair()
    before = logits(models[1])
    torch.testing.assert_close(logits(models[0]), before)
    for model in models:
        CHANGES[change](model)
    found, expected = map(logits, models)
    assert (expected - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_an_only_expert(change):
    model = pair()[0]
    if change == "dropped":
        with pytest.raises(ValueError, match="model: expected more than 1 expert in each mixture, to remove some"):
            CHANGES[change](model)
        return
    before = logits(model)
    CHANGES[change](model)
    assert 1e-3 < (logits(model) - before).norm() / before.norm() < 1.5


@pytest.mark.parametrize("change", CHANGES)
def test_all_experts_for_each_token_in_half_precision(change):
    model = build_mixture("mixtral", num_experts_per_tok=4, hidden_size=64, intermediate_size=64)
    exact, before = copy.deepcopy(model), logits(model)
    CHANGES[change](exact)
    CHANGES[change](model.half())
    found, expected = logits(model), logits(exact)
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert float((found - before).norm()) == pytest.approx(float((expected - before).norm()), rel=0.1)
