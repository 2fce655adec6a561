"""Checks whether a run can resume from a checkpoint: all files that Trainer reads exist, complete and as it wrote them.

`checkpoint_of_run.py` compares them with the model and the optimizer of the run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.display import one_line
from hf_cod.io.reading import naming_file, open_tensors, parse_json, read_state, read_text
from hf_cod.io.schema import brief, check_value

STATE = "trainer_state.json"
OPTIMIZER, SCHEDULER, RANDOMNESS = "optimizer.pt", "scheduler.pt", "rng_state*.pth"  # the last: one file per process
WEIGHTS = "*.safetensors"
# What Trainer writes in a checkpoint after the weights and before its own state.
_BEHIND_WEIGHTS = (OPTIMIZER, SCHEDULER, RANDOMNESS, "scaler.pt", "training_args.bin")
# What a run reads of Trainer's state -> its type.
_STATE = {
    "epoch": float,
    "global_step": int,
    "max_steps": int,
    "logging_steps": float,
    "eval_steps": float,
    "save_steps": float,
    "train_batch_size": int | None,
    "num_train_epochs": int,
    "num_input_tokens_seen": int,
    "total_flos": float,
    "best_metric": float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "is_local_process_zero": bool,
    "is_world_process_zero": bool,
    "is_hyper_param_search": bool,
    "trial_name": str | None,
    "trial_params": dict[str, Any] | None,
    "stateful_callbacks": dict[str, Any],
}
_SCHEDULER = {
    "last_epoch": int,
    "_step_count": int,
    "base_lrs": list[float],
    "_last_lr": list[float],
    "lr_lambdas": list[dict[str, Any] | None],
    "_is_initial": bool,
    "_get_lr_called_within_step": bool,
    "verbose": bool,
}


def check_files(checkpoint: Path, step: int) -> None:
    """Checks the files of a checkpoint that Trainer reads.

    Args:
        checkpoint: the checkpoint's folder.
        step: the expected step of the checkpoint.

    Raises:
        ValueError: a file is missing, truncated, or has other contents; the error names the file.
    """
    read_trainer_state(checkpoint / STATE, step)
    sharded = any(path.is_dir() for path in checkpoint.iterdir())  # FSDP and DeepSpeed write folders
    for path in _files(checkpoint, OPTIMIZER, sharded):
        _entries(path, ("state", "param_groups"))
    for path in _files(checkpoint, SCHEDULER, sharded):
        read_scheduler(path, step)
    for path in _files(checkpoint, RANDOMNESS, sharded):
        _check_randomness(path)
    for path in _files(checkpoint, WEIGHTS, sharded):
        with open_tensors(path, path.name, "whole weights"):
            pass


def is_state_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint has neither weights nor Trainer's state, but at most what Trainer writes between them: its
    directory was deleted while it was written.
    """
    names = [path.name for path in checkpoint.iterdir()]
    return all(any(fnmatch(name, pattern) for pattern in _BEHIND_WEIGHTS) for name in names)


def newest_whole(
    checkpoints: list[tuple[int, Path]], skipped: Callable[[Path, str], None], check: Callable[[Path, int], object]
) -> Path | None:
    """The newest complete checkpoint, from which a run can resume.

    Args:
        checkpoints: (step, folder), the newest first.
        skipped: called with each newer checkpoint and the reason why it is skipped.
        check: raises ValueError if the files of a (folder, step) are damaged or those of another run.
    """
    for step, path in checkpoints:
        try:
            check(path, step)
        except ValueError as error:
            skipped(path, one_line(error))
        else:
            return path
    return None


def read_trainer_state(path: Path, step: int) -> dict[str, Any]:
    """Trainer's state of a step.

    Raises:
        ValueError: an entry is of another type, or unknown to this version of transformers, or the step is another.
    """
    with advice_silenced():  # of bitsandbytes, which is imported with PEFT
        from transformers.trainer_callback import TrainerState

    with naming_file(path):
        # Logs may hold NaN: the norm of gradients in a step that was skipped.
        state = check_value(parse_json(read_text(path, path.name), path.name, nan=True), dict[str, Any], path.name)
        if state.get("global_step") != step:
            raise ValueError(f"{path.name}: expected step {step}, got {brief(state.get('global_step'))}")
        for name, kind in _STATE.items():
            if name in state:
                check_value(state[name], kind, name)
        log = check_value(state.get("log_history", []), list[dict[str, float]], "log_history", {"nan": True})
        for entry in log:
            check_value(entry.get("step"), float, "log_history[step]", {"least": 0, "most": step})
        try:
            TrainerState(**state)
        except Exception as error:
            raise ValueError(f"{path.name}: expected a state of Trainer, got {error}") from error
        return state


def read_scheduler(path: Path, step: int) -> dict[str, Any]:
    """The state of the learning rate's schedule.

    Raises:
        ValueError: entries are missing, unknown, or of another type or step.
    """
    state = _entries(path, ("last_epoch", "_step_count", "base_lrs", "_last_lr"))
    for name, value in state.items():
        if name not in _SCHEDULER:
            raise ValueError(f"{path.name}: expected {', '.join(_SCHEDULER)}, got {brief(name)}")
        check_value(value, _SCHEDULER[name], f"{path.name}: {name}", {"least": 0})
    # A step that loss scaling skips is not counted.
    if state["last_epoch"] > step:
        raise ValueError(f"{path.name}: expected step {step}, got {state['last_epoch']}")
    return state


def _files(checkpoint: Path, pattern: str, sharded: bool) -> list[Path]:
    found = sorted(checkpoint.glob(pattern))
    if not found and not sharded:
        raise ValueError(f"{pattern}: expected a file, got none")
    return found


def _entries(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    state = read_state(path, path.name)
    if not isinstance(state, dict) or not set(needed) <= set(state):
        raise ValueError(f"{path.name}: expected the entries {', '.join(needed)}, got other contents")
    return state


def _check_randomness(path: Path) -> None:
    """Sets generators of their own to the states, which are checked by that."""
    import numpy
    import torch

    state = _entries(path, ("python", "numpy", "cpu"))
    try:
        random.Random().setstate(state["python"])
        numpy.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
        others = state.get("cuda", [])
        for other in others if isinstance(others, list | tuple) else [others]:
            if other.dtype != torch.uint8 or other.ndim != 1:
                raise ValueError(f"a state of {other.dtype}")
    except Exception as error:  # of any type, as each library has its own
        raise ValueError(f"{path.name}: expected states of random generators, got {one_line(error)}") from error


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
