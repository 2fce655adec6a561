"""A second OwLoreAdamW on a model, and a model whose first one is gone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_cod import OwLoreAdamW, OwLoreConfig
from tests.tiny_models import build

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(7))


def made(kind):
    model = build("llama").train()
    if kind == "plain":
        return model, {"rank": 4}
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), {"rank": None}
    return get_peft_model(model, OwLoreConfig(r=4)), {}


def step(model, optimizer):
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["plain", "lora", "owlore"])
def test_a_second_optimizer_trains_all_layers_in_turn(kind):
    """As after a first stage of training: SFT, then DPO."""
    model, settings = made(kind)
    settings = {"n_active": 1, "interval": 1, "floor": 1.0, "lr": 1e-2, **settings}
    step(model, OwLoreAdamW(model, **settings))
    second = OwLoreAdamW(model, seed=5, **settings)
    visited, moved = set(), set()
    while len(visited) < 4:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        active = second.active[0]
        visited.add(active)
        step(model, second)
        after = model.state_dict()
        changed = {n for n in after if ".layers." in n and (n not in before or not torch.equal(after[n], before[n]))}
        moved |= {int(name.split(".layers.")[1].split(".")[0]) for name in changed}
    assert moved == visited == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["plain", "lora", "owlore"])
def test_release_lets_everything_train_again(kind):
    model, settings = made(kind)
    before = trainable(model)
    optimizer = OwLoreAdamW(model, n_active=1, interval=1, **settings)
    step(model, optimizer)
    assert trainable(model) < before
    optimizer.release()
    assert trainable(model) == before


def test_what_others_froze_since_stays_frozen(caplog):
    """PEFT freezes the base, and lets one adapter of several train."""
    plain = build("llama").train()
    step(plain, OwLoreAdamW(plain, n_active=1, rank=4))
    model = get_peft_model(plain, OwLoreConfig(r=4))
    step(model, OwLoreAdamW(model, n_active=1))
    assert all("owlore_increment.default" in name for name in trainable(model))
    model.add_adapter("second", OwLoreConfig(r=4))
    model.set_adapter("second")
    step(model, OwLoreAdamW(model, n_active=1))
    assert all("owlore_increment.second" in name for name in trainable(model))
    model.set_adapter("default")
    third = OwLoreAdamW(model, n_active=4)
    assert len(trainable(model)) == 28 and all("owlore_increment.default" in name for name in trainable(model))
    assert "requires_grad was changed" not in caplog.text
    third.layers.layers[0][0].requires_grad_(False)
    OwLoreAdamW(model, n_active=4)
    assert "call release() of that optimizer before you freeze" in caplog.text
