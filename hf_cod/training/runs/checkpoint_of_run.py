"""Compares the files of a checkpoint with the model and the optimizer that resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.reading import open_tensors, read_state
from hf_cod.io.schema import brief
from hf_cod.training.owlore.increment import PLACE, TENSORS, Increment
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.saved_moments import Layout, check_own_entries, layers_with_state, layouts
from hf_cod.training.runs.checkpoint_checksums import check_checksums
from hf_cod.training.runs.checkpoint_files import (
    OPTIMIZER,
    SCHEDULER,
    STATE,
    WEIGHTS,
    check_files,
    finite,
    read_scheduler,
    read_trainer_state,
)
from hf_cod.training.runs.finite import not_finite

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import ExportableState

# A distillation loss of 0 is negative by rounding.
ROUNDING = 1e-3
_RATES = ("lr", "initial_lr")  # what the schedule of the learning rate sets


def check_of_run(trainer: Any, checkpoint: Path, step: int, *, same_batches: bool = True) -> None:
    """Checks that a Trainer whose optimizer exists can resume from a checkpoint.

    Args:
        trainer: the Trainer.
        checkpoint: the checkpoint's folder.
        step: its expected step.
        same_batches: whether the size of its micro-batches, and how often it logs and saves, must be those of the
            checkpoint.

    Raises:
        ValueError: a file is damaged, weights or optimizer state are of another model or run, or not finite.
    """
    check_files(checkpoint, step)
    _check_state_of_trainer(trainer, read_trainer_state(checkpoint / STATE, step), same_batches)
    check_weights(trainer.model, checkpoint)
    saved = None
    path = checkpoint / OPTIMIZER
    if path.is_file():
        saved = read_state(path, path.name)
        check_optimizer(trainer.optimizer, saved, step)
    path = checkpoint / SCHEDULER
    if path.is_file():
        _check_scheduler(trainer, read_scheduler(path, step), saved, step)
    check_checksums(checkpoint)  # last: the checks above say more


def _check_state_of_trainer(trainer: Any, state: dict[str, Any], same_batches: bool) -> None:
    """Checks what Trainer reads of its state without a check."""
    names = ("max_steps", "train_batch_size", "logging_steps", "save_steps") if same_batches else ("max_steps",)
    for name in names:
        own = getattr(trainer.args, name)
        if state.get(name) != own:
            raise ValueError(f"{name}: expected {own}, got {brief(state.get(name))}")
    if same_batches:
        _check_losses(state, trainer.args.logging_steps)
    for kind in ("logging", "eval", "save"):
        every = state.get(f"{kind}_steps", 1)
        if getattr(trainer.args, f"{kind}_strategy") == "steps" and every <= 0:
            raise ValueError(f"{kind}_steps: expected a number above 0, got {every}")
    noted = state.get("stateful_callbacks", {})
    for callback in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(callback, ExportableState) and type(callback).__name__ not in noted:
            found = ", ".join(noted) or "none"
            raise ValueError(f"stateful_callbacks: expected {type(callback).__name__}, got {brief(found)}")


def _check_losses(state: dict[str, Any], every: int) -> None:
    """Checks that Trainer's log has the loss of each of its steps, which the run reports."""
    losses = [entry for entry in state.get("log_history", []) if "loss" in entry]
    expected = [*range(every, state["global_step"] + 1, every)]
    found = [entry["step"] for entry in losses]
    # A run logs its last step, too, and that after which it was interrupted.
    if found != sorted({*found}) or not {*expected} <= {*found}:
        raise ValueError(f"log_history: expected losses of steps {brief(expected)}, got {brief(found)}")
    negative = next((entry["loss"] for entry in losses if entry["loss"] < -ROUNDING), None)
    if negative is not None:
        raise ValueError(f"log_history: expected losses of at least 0, got {negative}")


def _check_scheduler(trainer: Any, state: dict[str, Any], saved: dict[str, Any] | None, step: int) -> None:
    """Compares the state of the learning rate's schedule with the optimizer and its saved state."""
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    if state["base_lrs"] != rates:
        raise ValueError(f"{SCHEDULER}: expected the learning rates {brief(rates)}, got {brief(state['base_lrs'])}")
    # Loss scaling skips steps, which are not counted; Accelerate counts one for each process.
    if trainer.args.world_size == 1 and trainer.accelerator.scaler is None and state["last_epoch"] != step:
        raise ValueError(f"{SCHEDULER}: expected step {step}, got {state['last_epoch']}")
    current = None if saved is None else [group["lr"] for group in saved["param_groups"]]
    if current not in (None, state["_last_lr"]):
        raise ValueError(f"{OPTIMIZER}: expected the learning rates {brief(state['_last_lr'])}, got {brief(current)}")


def _saved_prefix(name: str) -> str:
    """What begins the names of an increment's saved tensors: its own without that of the adapter."""
    module, _, own = name.rpartition(f".{PLACE}.")
    _, _, parameter = own.partition(".")  # of a bank
    return f"{module}.{PLACE}.{parameter}." if parameter else f"{module}.{PLACE}."


def check_weights(model: Any, checkpoint: Path) -> None:
    """Compares names, shapes and dtypes of saved weights with those that the model would save.

    Raises:
        ValueError: they differ, or values are not finite.
    """
    own = _own_weights(model)
    increments = {_saved_prefix(name): m for name, m in model.named_modules() if isinstance(m, Increment)}
    found: set[str] = set()
    grown: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in increments}
    for path in sorted(checkpoint.glob(WEIGHTS)):
        with open_tensors(path, path.name, "whole weights") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(key)
                prefix, _, last = key.rpartition(".")
                if f"{prefix}." in increments and last in TENSORS:  # their ranks grow
                    grown[f"{prefix}."][last] = tensor
                else:
                    _check_one(key, tensor, own.get(key))
                if not_finite([(key, tensor)]):
                    raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {key}")
                found.add(key)
    for prefix, increment in increments.items():
        increment.check_saved(grown[prefix], prefix)
    held = {_place(own[key]) for key in found & own.keys()}
    missing = [
        key
        for key, tensor in own.items()
        if key not in found and f"{key.rpartition('.')[0]}." not in increments and _place(tensor) not in held
    ]
    if missing:
        raise ValueError(f"weights: expected {missing[0]}, got none")


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], step: int) -> None:
    """Compares a saved state of an optimizer with the parameters that it trains.

    Raises:
        ValueError: groups, names, shapes or dtypes differ, or values are not finite.
    """
    own = optimizer.state_dict()
    if saved.keys() != own.keys():
        raise ValueError(f"{OPTIMIZER}: expected the entries {', '.join(own)}, got {brief(', '.join(map(str, saved)))}")
    _check_groups(own["param_groups"], saved["param_groups"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, OwLoreAdamW):
        check_own_entries(optimizer, saved, step)
        expected, needed = layouts(optimizer), layers_with_state(optimizer, step)
    else:
        expected, needed = [_adam(p) for p in parameters], {None}
    states = saved["state"]
    if not isinstance(states, dict) or not set(states) <= set(range(len(parameters))):
        raise ValueError(f"{OPTIMIZER}: expected states of {len(parameters)} parameters, got others")
    for number, state in states.items():
        if state != {} or type(state) is not dict:
            _check_state(number, state, expected[number], step)
    _check_present(own["param_groups"], states, needed)


def _check_present(groups: list[dict[str, Any]], states: dict[int, Any], needed: set[int | None]) -> None:
    """Checks that what has trained has a state; a single parameter may never have had a gradient."""
    for layer in needed:
        numbers = [n for group in groups if group.get("layer") == layer for n in group["params"]]
        if numbers and not any(states.get(number) for number in numbers):
            where = "" if layer is None else f" of layer {layer}"
            raise ValueError(f"{OPTIMIZER}: expected the moments{where}, got none")


def _check_groups(own: list[dict[str, Any]], saved: Any) -> None:
    if type(saved) is not list or len(saved) != len(own):
        raise ValueError(f"{OPTIMIZER}: expected {len(own)} groups of parameters, got others")
    for mine, theirs in zip(own, saved, strict=True):
        if type(theirs) is not dict or theirs.get("params") != mine["params"]:
            raise ValueError(f"{OPTIMIZER}: expected groups of {len(mine['params'])} parameters, got others")
        if set(theirs) - {"initial_lr"} != set(mine) - {"initial_lr"}:
            raise ValueError(f"{OPTIMIZER}: expected the settings {', '.join(mine)}, got {', '.join(map(str, theirs))}")
        peak = mine.get("initial_lr", mine["lr"])  # a schedule that exists has set the first rate
        for name, value in theirs.items():
            if name in _RATES:
                right = finite(value) and 0 <= value <= peak
            elif isinstance(mine[name], bool | None):  # how a step is computed, which depends on the device
                right = isinstance(value, bool | None)
            else:
                right = name == "params" or (type(value) is not Tensor and value == mine[name])
            if not right:
                raise ValueError(f"{OPTIMIZER}: expected {name} {brief(mine.get(name, peak))}, got {brief(value)}")


def _check_state(number: int, state: Any, expected: Layout, step: int) -> None:
    field = f"{OPTIMIZER}: parameter {number}"
    if type(state) is not dict or state.keys() != expected.keys():
        raise ValueError(f"{field}: expected the entries {', '.join(expected)}, got others")
    for name, (dtype, shape) in expected.items():
        value = state[name]
        if not isinstance(value, Tensor) or (value.dtype, tuple(value.shape)) != (dtype, shape):
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else brief(value)
            raise ValueError(f"{field}: expected {name} of {dtype} {shape}, got {got}")
        if not_finite([(name, value)]):
            raise ValueError(f"{field}: expected finite numbers, got NaN or infinity in {name}")
    if not 0 <= float(state["step"]) <= step:
        raise ValueError(f"{field}: expected step {step}, got {float(state['step']):g}")
    if bool((state["exp_avg_sq"] < 0).any()):
        raise ValueError(f"{field}: expected squares, got negative numbers in exp_avg_sq")


def _check_one(key: str, tensor: Tensor, own: Tensor | None) -> None:
    if own is None:
        raise ValueError(f"weights: expected those of this model, got {brief(key)}")
    if (tensor.dtype, tensor.shape) != (own.dtype, own.shape):
        raise ValueError(
            f"weights: expected {key} of {own.dtype} {tuple(own.shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _own_weights(model: Any) -> dict[str, Tensor]:
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model))


def _adam(parameter: Tensor) -> Layout:
    moment = (parameter.dtype, tuple(parameter.shape))
    return {"step": (torch.float32, ()), "exp_avg": moment, "exp_avg_sq": moment}


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Tied weights have one place; the file holds one of them."""
    return tensor.data_ptr(), tensor.shape
