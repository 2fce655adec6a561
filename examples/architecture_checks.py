"""What `architectures.py` checks of each function on a model: each check can fail, and says in words what was excluded.

A check takes the kind of model, and returns a note or None. A difference that nobody was told of raises `WrongResult`;
a ValueError of the package is a refusal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from architecture_inputs import batches_for
from architecture_references import (
    ROUNDING,
    WrongResult,
    check_counted,
    check_reload,
    cut_to_ranks,
    generates_alike,
    loss_of,
    naive_angles,
    outputs_of,
    passing_on,
    require,
    same,
    told_weights,
    zeroed_as,
)
from tiny_architectures import Case
from torch import Tensor

from hf_cod import (
    OwlBnbConfig,
    OwLoreAdamW,
    OwLoreConfig,
    RankPlan,
    diagnose,
    drop,
    factorize,
    find_decoder_layers,
    narrow,
    prune,
    quantize,
    skip,
)
from hf_cod.layers.stacks import named_stacks


def check_diagnosis(case: Case) -> str | None:
    """Angles against hooks on the layers; the model is left as it was."""
    model = case.build()
    before, intact = copy.deepcopy(model.state_dict()), outputs_of(case, model)
    report = diagnose(model, batches=batches_for(case, model), layers_path=case.stack, show_progress=False)
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, before[name]), f"{name} has changed")
    same(outputs_of(case, model), intact, "the model after the diagnosis", 0)
    for index, expected in enumerate(naive_angles(case, model)):
        got = report.layers["angular_distance"][index]
        alike = got is expected is None or (got is not None and expected is not None and abs(got - expected) < 1e-3)
        require(alike, f"angle of layer {index}: {got}, by hooks {expected}")
    return None


def check_prune(case: Case) -> str | None:
    """Zeros counted = promised; weights counted + excluded = all weights of the layers; a reload is equal."""
    model = case.build()
    stack = find_decoder_layers(model, case.stack)
    report = prune(model, 0.5, "wanda", batches=batches_for(case, model), layers_path=case.stack)
    matrices = [weight for index in range(len(stack)) for _, weight in stack.matrices(index)]
    counted = sum(W.numel() for W in matrices)
    share = sum(int((W == 0).sum()) for W in matrices) / counted
    require(abs(share - 0.5) < 0.02, f"{share:.3f} of the weights are 0 instead of 0.5")
    require(abs(share - report.results["sparsity"]) < 1e-6, f"{share} of the weights are 0, and the report differs")
    require(sum(report.layers["parameters"]) == counted, f"the report counts other weights than the {counted:,}")
    check_reload(case, model)
    return check_counted(stack, counted)


def check_drop(case: Case) -> str | None:
    """Skip = a layer that returns its input = drop; generation with a cache = without; a reload is equal. Of several
    stacks, on each.
    """
    stacks = [case.stack] if case.stack else [stack.name for stack in named_stacks(case.build())] or [None]
    told = [_dropped(case, stack) for stack in stacks]
    return next((note for note in told if note), None)


def _dropped(case: Case, stack: str | None) -> str | None:
    for layers in (1,) if stack is None else (0, 1):
        model = case.build()
        intact = outputs_of(case, model)
        with passing_on(find_decoder_layers(model, stack), layers) as calls:
            passed = outputs_of(case, model)
        with skip(model, layers, stack):
            skipped = outputs_of(case, model)
        same(outputs_of(case, model), intact, "the model after skip", 0)
        drop(model, layers, stack)
        if calls:
            same(skipped, passed, "skip against a layer that returns its input", 1e-4)
        same(skipped, outputs_of(case, model), "skip against drop", 0)
        check_reload(case, model)
    return generates_alike(case, model)


def check_quantize(case: Case) -> str | None:
    """Quantized = its own `dequantize()`; weights quantized + excluded = those of all matrices; a reload is equal."""
    model = case.build()
    stack = find_decoder_layers(model, case.stack)
    sizes = {name: W.numel() for index in range(len(stack)) for name, W in stack.matrices(index)}
    report = quantize(model, OwlBnbConfig(bits=4), layers_path=case.stack)
    check_reload(case, model)
    quantized = outputs_of(case, model)
    dense: Any = copy.deepcopy(model).dequantize()
    same(quantized, outputs_of(case, dense), "dequantize()", 2e-2)
    done, told = sum(sizes[name] for name in report.results["module_bits"]), told_weights(report.notes, sizes)
    require(
        done + told == sum(sizes.values()), f"{done:,} weights quantized, {told:,} excluded, {sum(sizes.values()):,}"
    )
    return _first_of([note for note in report.notes if "not quantized" in note])


def check_factorize(case: Case) -> str | None:
    """Factorized at the rank that matrices have = intact; a reload is equal."""
    model = case.build()
    stack = find_decoder_layers(model, case.stack)
    matrices = [name for index in range(len(stack)) for name in stack.input_shapes(index)]
    ranks = factorize(case.build(), 0.9, "plain", layers_path=case.stack).results["ranks"]
    cut_to_ranks(model, ranks)
    intact = outputs_of(case, model)
    report = factorize(model, RankPlan("rank", 0.5, ranks, "given"), "plain", layers_path=case.stack)
    require(report.results["ranks"] == ranks, "ranks differ from the plan")
    for name, rank in ranks.items():
        thin = sorted(min(p.shape) for p in model.get_submodule(name).parameters() if p.dim() == 2)
        require(thin == [rank, rank], f"{name} has factors of ranks {thin} instead of {rank}")
    same(outputs_of(case, model), intact, "the model of this rank", 1e-4)
    check_reload(case, model)
    left = len(matrices) - len(ranks)
    return f"{left} of {len(matrices)} matrices have no factors" if left else None


def check_narrow(case: Case) -> str | None:
    """Fewer heads and channels = zeroed ones; a reload is equal; generation with a cache = without."""
    model = case.build()
    size = sum(p.numel() for p in model.parameters())
    narrow(model, 0.85, "magnitude", "none", channel_multiple=8, layers_path=case.stack)
    require(sum(p.numel() for p in model.parameters()) < size, "no weight was removed")
    zeroed = outputs_of(case, zeroed_as(model, case.build()))
    same(outputs_of(case, model), zeroed, "the model with zeros", ROUNDING)
    model = case.build()
    report = narrow(model, 0.85, "fluctuation", batches=batches_for(case, model), layers_path=case.stack)
    check_reload(case, model)
    generates_alike(case, model)
    return _first_of([note for note in report.notes if "not narrowed" in note])


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


# Column of the table -> check.
CHECKS: dict[str, Callable[[Case], str | None]] = {
    "diagnose": check_diagnosis,
    "prune": check_prune,
    "drop": check_drop,
    "quantize": check_quantize,
    "factorize": check_factorize,
    "narrow": check_narrow,
    "owlore": check_owlore,
    "adapter": check_adapter,
}
# Of a stack that is chosen by name: training has no such choice.
TRAINING = ("owlore", "adapter")


def checks_of(case: Case) -> list[str]:
    """The checks of a kind of model."""
    return [check for check in CHECKS if case.stack is None or check not in TRAINING]


def _first_of(notes: list[str]) -> str | None:
    return f"{len(notes)} note{'s' if len(notes) > 1 else ''}, such as: {notes[0]}" if notes else None


def _gradients(case: Case, checkpointing: bool, sampled: bool) -> dict[str, Tensor]:
    """The gradient of each weight that has one; `sampled`: of those that OwLore trains."""
    model = _for_training(case.build(), checkpointing)
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
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _step(case: Case, model: Any, base: Any, optimizer: Any, steps: int) -> None:
    _for_training(model, False)
    for _ in range(steps):
        loss_of(case, model, base).backward()
        optimizer.step()
        optimizer.zero_grad()
