"""Checks whether a pre-training run can resume from a checkpoint: of Trainer, or of a custom loop on accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from hf_cod.io.reading import naming_file, parse_json, read_state, read_text
from hf_cod.io.schema import check_value
from hf_cod.training.runs.checkpoint_files import check_files
from hf_cod.training.runs.checkpoint_of_run import check_of_run, check_optimizer, check_weights

PROGRESS = "progress.json"
OPTIMIZER, SCHEDULE, RANDOMNESS = "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_*.pkl"


class Progress(TypedDict):
    """The last file of a checkpoint of a custom loop: its step, and what was logged up to it."""

    step: int
    history: list[dict[str, float]]


def check_of_trainer(trainer: Any, checkpoint: Path, step: int) -> None:
    """As `check_of_run`, for a run whose micro-batches may change their size; shards of FSDP are not compared.

    Raises:
        ValueError: a file is damaged, weights or optimizer state are of another model or run, or not finite.
    """
    if _sharded(checkpoint):
        check_files(checkpoint, step)
    else:
        check_of_run(trainer, checkpoint, step, same_batches=False)


def check_of_loop(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, step: int) -> None:
    """Checks that a custom loop can resume from a checkpoint of accelerate; shards of FSDP are not compared.

    Args:
        model: the model without wrappers.
        optimizer: torch's optimizer, without accelerate's wrapper.
        checkpoint: the checkpoint's folder.
        step: its expected step.

    Raises:
        ValueError: a file is missing, truncated, or of another model or run, or values are not finite.
    """
    read_progress(checkpoint, step)
    if _sharded(checkpoint):
        return
    check_weights(model, checkpoint)
    check_optimizer(optimizer, _entries(checkpoint / OPTIMIZER, {"state", "param_groups"}), step)
    schedule = _entries(checkpoint / SCHEDULE, {"last_epoch", "base_lrs"})
    if schedule["last_epoch"] != step:
        raise ValueError(f"{SCHEDULE}: expected step {step}, got {schedule['last_epoch']}")
    found = sorted(checkpoint.glob(RANDOMNESS))
    if not found:
        raise ValueError(f"{RANDOMNESS}: expected a file, got none")
    for path in found:
        _entries(path, {"random_state", "numpy_random_seed", "torch_manual_seed"})


def read_progress(checkpoint: Path, step: int) -> Progress:
    """The progress of a custom loop at a step.

    Raises:
        ValueError: no such file, other contents, or another step.
    """
    path = checkpoint / PROGRESS
    with naming_file(path):  # losses may be NaN in a run that diverges
        content = parse_json(read_text(path, PROGRESS), PROGRESS, nan=True)
        found: Progress = check_value(content, Progress, PROGRESS, {"nan": True})
        if found["step"] != step:
            raise ValueError(f"{PROGRESS}: expected step {step}, got {found['step']}")
        return found


def _sharded(checkpoint: Path) -> bool:
    return any(path.is_dir() for path in checkpoint.iterdir())  # FSDP and DeepSpeed write folders


def _entries(path: Path, needed: set[str]) -> dict[str, Any]:
    found = read_state(path, path.name)
    if not isinstance(found, dict) or not needed <= found.keys():
        raise ValueError(f"{path.name}: expected the entries {', '.join(sorted(needed))}, got other contents")
    return found
