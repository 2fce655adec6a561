"""What `architectures.py` checks of training: OwLore on the weights, and on adapters."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from architecture_comparison import WrongResult, outputs_of, require, same, unchanged_if_refused
from architecture_references import loss_of
from tiny_architectures import Case
from torch import Tensor

from hf_cod import OwLoreAdamW, OwLoreConfig, find_decoder_layers


def check_owlore(case: Case) -> str | None:
    """Layers that were not sampled are bit-equal, the sampled one has moved; its gradients and its changes are those of
    the model without OwLore, also with gradient checkpointing."""
    intact = _gradients(case, checkpointing=False, sampled=False)
    saves = _saves_memory(case, intact)
    modes = (False, True) if saves else (False,)
    for checkpointing in modes:
        found = _gradients(case, checkpointing, sampled=True)
        require(bool(found), "no weight has a gradient")
        _same_gradients(found, intact, " with gradient checkpointing" if checkpointing else "")
    moved = [_trained(case, checkpointing) for checkpointing in modes]
    require(moved[0].keys() == moved[-1].keys(), "other weights move with gradient checkpointing")
    for name in (name for name, change in moved[0].items() if change.dim() > 1):
        # Not biases: that of keys has no gradient but rounding, which Adam scales up.
        same(moved[-1][name], moved[0][name], f"{name} with gradient checkpointing", 1e-3)
    return None if saves else "gradients of the intact model differ with gradient checkpointing"


def check_adapter(case: Case) -> str | None:
    """OwLore adapters: training moves the outputs and the sampled layers' adapters; all else stays bit-equal."""
    from peft import get_peft_model

    base = case.build()
    stack = find_decoder_layers(base)
    before, intact = copy.deepcopy(base.state_dict()), outputs_of(case, base)
    # PEFT's class of a task names the inputs that it passes on.
    task = None if case.group else "CAUSAL_LM"
    with unchanged_if_refused(base):
        model: Any = get_peft_model(base, OwLoreConfig(r=4, task_type=task))
    optimizer = OwLoreAdamW(model, lr=1e-1, n_active=2)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer." not in name}
    _step(case, model, base, optimizer, 2)
    found = dict(model.named_parameters())
    moved = {stack.index_of(name) for name, p in adapters.items() if not torch.equal(found[name], p)}
    require(len(moved) == 2 and None not in moved, f"adapters of layers {moved} have moved instead of two")
    model.eval()
    require(not torch.equal(outputs_of(case, base), intact), "the outputs have not moved")
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in before.items():
        require(torch.equal(plain[name], tensor), f"{name} of the base has moved")
    return None


def _gradients(case: Case, checkpointing: bool, sampled: bool) -> dict[str, Tensor]:
    """The gradient of each weight that has one; `sampled`: of those that OwLore trains."""
    model = _for_training(case.build(), checkpointing)
    with unchanged_if_refused(model):
        optimizer = OwLoreAdamW(model, n_active=1, rank=4) if sampled else None
    loss_of(case, model, model).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        optimizer.release()
    return found


def _same_gradients(found: dict[str, Tensor], intact: dict[str, Tensor], how: str) -> None:
    largest = max(float(gradient.abs().max()) for gradient in intact.values() if gradient.numel())
    for name, gradient in found.items():
        # A gradient that is nothing but rounding, as of the bias of keys, has no scale of its own.
        if gradient.numel() and float(intact[name].abs().max()) > 1e-4 * largest:
            same(gradient, intact[name], f"the gradient of {name}{how}", 1e-4)


def _saves_memory(case: Case, intact: dict[str, Tensor]) -> bool:
    """Whether transformers itself gets the same gradients with gradient checkpointing."""
    try:
        _same_gradients(_gradients(case, checkpointing=True, sampled=False), intact, "")
    except (WrongResult, RuntimeError):
        return False
    return True


def _trained(case: Case, checkpointing: bool) -> dict[str, Tensor]:
    """What two steps of OwLore with one sampled layer have moved: name -> change."""
    model: Any = case.build()
    stack = find_decoder_layers(model)
    _for_training(model, checkpointing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(case, model, model, OwLoreAdamW(model, lr=1e-2, n_active=1, rank=4, interval=100), 2)
    moved = {
        name: p.detach() - before[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    layers = {stack.index_of(name) for name in moved} - {None}
    require(len(layers) == 1, f"layers {sorted(layers)} have moved instead of one")
    require(all(math.isfinite(float(change.sum())) for change in moved.values()), "changes are not finite")
    return moved


def _for_training(model: Any, checkpointing: bool) -> Any:
    """The model in training mode, without anything random."""
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _step(case: Case, model: Any, base: Any, optimizer: Any, steps: int) -> None:
    _for_training(model, False)
    for _ in range(steps):
        loss_of(case, model, base).backward()
        optimizer.step()
        optimizer.zero_grad()
