import sys

import pytest
import torch
from torch import nn

from hf_cod import collect_statistics, find_decoder_layers, prune
from hf_cod.training.healing.masked_adapters import merge_masked
from hf_cod.training.healing.recovery import _adapted, recover
from tests.tiny_models import batch_for, build


def pruned(family, **changes):
    model = build(family, **changes)
    prune(model, 0.6, "wanda", batches=[batch_for(model)])
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_the_text_is_learned(family, dtype):
    model = pruned(family, dtype=dtype).train()
    batch = batch_for(model, "right")
    if family == "bert":
        batch["labels"] = batch["input_ids"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stack = find_decoder_layers(model)
    matrices = {f"{name}.weight" for i in range(4) for name in stack.linears(i)}
    matrices |= {matrix.name for i in range(4) for matrix in stack.expert_matrices(i)}
    modules = [type(module) for module in model.modules()]
    losses = recover(model, [batch], 30, learning_rate=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    for name, p in model.named_parameters():
        if name in matrices:
            assert ((p == 0) >= (before[name] == 0)).all() and not torch.equal(p, before[name]), name
            assert float((p == 0).float().mean()) == pytest.approx(0.6, abs=0.02)
        else:
            assert torch.equal(p, before[name]), name
        assert p.requires_grad
    assert modules == [type(module) for module in model.modules()] and not hasattr(model, "peft_config")
    assert all(module.training for module in model.modules()), "modes come back"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_what_was_trained_is_what_is_merged(family):
    model = pruned(family)
    batch = batch_for(model)
    intact = model(**batch).logits
    with torch.no_grad(), _adapted(find_decoder_layers(model), rank=4, seed=0) as adapters:
        model.eval()
        torch.testing.assert_close(model(**batch).logits, intact)
        for adapter in adapters:
            nn.init.normal_(adapter.lora_B["default"].weight)
        trained = model(**batch).logits
        for adapter in adapters:
            merge_masked(adapter)
    assert (trained - intact).abs().max() > 1
    torch.testing.assert_close(model(**batch).logits, trained)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_runs_repeat_by_seed_and_leave_the_generator_alone():
    batches = [batch_for(build("llama")), batch_for(build("llama"), "left")]
    models = [pruned("llama") for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    losses = [recover(model, batches, 4, seed=seed) for model, seed in zip(models, (1, 1, 2), strict=True)]
    assert torch.rand(1) == expected
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, batch = pruned("llama"), batch_for(build("llama"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="batches: expected at least one to recover on"):
        recover(model, [], 3)
    with pytest.raises(ValueError, match=r"recover: expected a finite loss, got nan at step [1-9]"):
        recover(model, [batch], 30, learning_rate=1e30)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    collect_statistics(model, [batch])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_cod\[recovery\]'"):
        recover(model, [batch], 1)
