"""Checks whether a run can resume from a checkpoint: all files that Trainer reads exist, complete and of this run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cod.io.reading import open_tensors, read_json, read_state
from hf_cod.io.schema import check_value

# File of a Trainer checkpoint -> the entries that Trainer reads from it.
STATES = {
    "optimizer.pt": ("state", "param_groups"),
    "scheduler.pt": ("last_epoch",),
    "rng_state*.pth": ("python", "numpy", "cpu"),  # one file per process
}
WEIGHTS = "*.safetensors"

Contents = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape) of each tensor."""


def contents(checkpoint: Path, marker: str, step: int) -> Contents:
    """Checks the files of a checkpoint that Trainer reads, and returns dtypes and shapes of its weights.

    Tensors are memory-mapped, not read, so a large checkpoint takes no longer than a small one.

    Args:
        checkpoint: the checkpoint's folder.
        marker: name of the file that is written last, Trainer's own state.
        step: the expected step of the checkpoint.

    Raises:
        ValueError: a file is missing, truncated, or has other contents; the error names the file.
    """
    state = check_value(read_json(checkpoint / marker, marker), dict[str, Any], marker)
    if state.get("global_step") != step:
        raise ValueError(f"{marker}: expected step {step}, got {state.get('global_step')}")
    sharded = any(path.is_dir() for path in checkpoint.iterdir())  # FSDP and DeepSpeed write folders
    for pattern, entries in STATES.items():
        for path in _files(checkpoint, pattern, sharded):
            _check_state(path, entries)
    weights = _files(checkpoint, WEIGHTS, sharded)
    found: Contents = {}
    for path in weights:
        with open_tensors(path, path.name, "whole weights") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(key)
                found[key] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def newest_whole(checkpoints: list[tuple[int, Path]], marker: str, skipped: Callable[[Path, str], None]) -> Path | None:
    """The newest complete checkpoint, from which a run can resume.

    A checkpoint whose tensors differ from those of the next older complete one counts as that of another model.

    Args:
        checkpoints: (step, folder), the newest first.
        marker: see `contents`.
        skipped: called with each newer checkpoint and the reason why it is skipped.
    """
    taken: tuple[Path, Contents] | None = None
    for step, path in checkpoints:
        try:
            found = contents(path, marker, step)
        except ValueError as error:
            if taken is None:
                skipped(path, str(error))
            continue
        if taken is None:
            taken = path, found
            continue
        if found == taken[1]:
            break
        skipped(taken[0], f"weights: expected the tensors of {path.name}, got those of another model")
        taken = path, found
    return None if taken is None else taken[0]


def _files(checkpoint: Path, pattern: str, sharded: bool) -> list[Path]:
    found = sorted(checkpoint.glob(pattern))
    if not found and not sharded:
        raise ValueError(f"{pattern}: expected a file, got none")
    return found


def _check_state(path: Path, entries: tuple[str, ...]) -> None:
    state = read_state(path, path.name)
    if not isinstance(state, dict) or not set(entries) <= set(state):
        raise ValueError(f"{path.name}: expected the entries {', '.join(entries)}, got other contents")
