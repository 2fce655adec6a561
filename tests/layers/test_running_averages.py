"""BatchNorms whose weights are frozen stay as they are in each training, and the others move."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel

from examples.tiny_architectures import tiny_config
from hf_cod import HealSettings, OwLoreAdamW, OwLoreConfig, heal
from hf_cod.layers.running_averages import averages_kept, keep_averages, release_averages
from hf_cod.training.healing.recovery import recover
from tests.tiny_models import build, two_batches

SOUND = torch.randn(2, 8000, generator=torch.Generator().manual_seed(2))


def conformer():
    torch.manual_seed(0)
    config = tiny_config("wav2vec2-conformer")
    config.layerdrop = 0.0  # each layer runs
    return AutoModel.from_config(config).eval()


def output(model):
    return model(input_values=SOUND).last_hidden_state


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model.train()  # as Trainer does
        output(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def averages(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running_" in name or "tracked" in name}


def is_kept(model, before):
    return [torch.equal(buffer, before[name]) for name, buffer in averages(model).items()]


def test_an_adapter_on_its_base_is_the_trained_model(tmp_path):
    base, model = conformer(), get_peft_model(conformer(), OwLoreConfig(r=2))
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2)
    train(model, optimizer)
    assert all(module.training for module in model.modules() if isinstance(module, nn.BatchNorm1d)), "the mode is back"
    before = averages(base)
    assert len(before) == 12 and all(is_kept(model.base_model.model, before))
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(again), output(model)) and not torch.equal(output(again), output(conformer()))


def test_sampled_layers_move_and_the_others_do_not():
    model = conformer()
    optimizer = OwLoreAdamW(model, lr=1e-3, n_active=1)
    before = averages(model)
    train(model, optimizer)
    kept = dict(zip(before, is_kept(model, before), strict=True))
    assert all(kept[name] != name.startswith(f"encoder.layers.{optimizer.active[0]}.") for name in kept)
    optimizer.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.BatchNorm1d))


class Averaging(nn.Module):
    """A module without weights that has a running mean, behind another one."""

    def __init__(self, inner, affine):
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(32, affine=affine)

    def forward(self, x):
        return self.norm(self.inner(x).mT).mT


def averaging(affine):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Averaging(layer.mlp, affine)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_by_trainer(method, affine):
    """Adapters are merged at the end. A training of all weights moves the averages, as it should."""
    student, windows = averaging(affine), torch.randint(3, 99, (16, 12), generator=torch.Generator().manual_seed(1))
    before = averages(student)
    how = {"method": method, "steps": 2, "batch_size": 4, "micro_batch_size": 4, "sequence_length": 12}
    heal(student, build("llama"), windows, settings=HealSettings(**how, eval_samples=4))
    kept = is_kept(student, before)
    assert len(kept) == 12 and (all(kept) if method == "lora" else not any(kept))


def test_recovery():
    student = averaging(True)
    before = averages(student)
    recover(student, two_batches(student), 2)
    assert all(is_kept(student, before))


def test_each_owner_ends_its_own():
    norm, owner = nn.BatchNorm1d(4).requires_grad_(False).train(), nn.Module()
    x, before = torch.randn(8, 4), averages(norm)
    keep_averages(norm)
    keep_averages(norm)
    with averages_kept(norm):
        keep_averages(norm, owner)
        norm(x)
    release_averages(norm)
    norm(x)
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        norm(x[0])
    assert norm.training and all(is_kept(norm, before))
    same = copy.deepcopy(norm)
    same.requires_grad_(True)(x)
    assert not any(is_kept(same, before)), "a copy that trains, as in PEFT's modules_to_save"
    release_averages(owner)
    norm(x)
    assert not any(is_kept(norm, before))


def test_modules_that_train_in_full_beside_an_adapter_move():
    model = get_peft_model(conformer(), OwLoreConfig(r=2, modules_to_save=["batch_norm"]))
    before = averages(model)
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=4), 1)
    assert {name for name, kept in zip(before, is_kept(model, before), strict=True) if not kept} == {
        name for name in before if "modules_to_save" in name
    }
