"""A run's directory: whose it is, and its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cod.io.files import write_json

CHECKPOINT = "checkpoint-"
SETTINGS, SCORES_FILE, REPORT = "settings.json", "scores.json", "report.json"
_EXPECTED = "output: expected a new directory, or that of an interrupted run"


def last_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, the newest first; what is only named like one does not count."""
    named = [(path.name.removeprefix(CHECKPOINT), path) for path in Path(directory).glob(f"{CHECKPOINT}[0-9]*")]
    return sorted(((int(step), path) for step, path in named if step.isdecimal() and path.is_dir()), reverse=True)


def last_checkpoint(directory: str | Path, marker: str) -> Path | None:
    """The newest whole checkpoint: the one with the highest step whose `marker`, which is written last, can be read."""
    for _, path in last_steps(directory):
        try:
            json.loads((path / marker).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the process died while it wrote this one
        return path
    return None


def claim(directory: Path, wanted: dict[str, Any], *, finished: bool = False) -> None:
    """Makes the directory this run's; what was noted of it before stays noted.

    A run that ended before its first checkpoint has left nothing to go on from: other settings take its place.

    Args:
        directory: the run's, which need not exist.
        wanted: what tells this run from others, as JSON has it.
        finished: whether the same run may claim it again when it is done. Its report tells its settings, too, and of
            settings that earlier versions did not note any value will do.

    Raises:
        ValueError: it is that of another run, of a finished one, or of a model; it holds checkpoints that are not this
            run's, or anything else that goes by their name; or it is a file.
    """
    _check_free(directory, finished)
    wanted = json.loads(json.dumps(wanted))
    noted = _noted(directory / SETTINGS)
    found = noted or (_reported(directory) if finished else {})
    held = _check_held(directory, known=bool(found) if finished else wanted.keys() <= found.keys())
    changed = [name for name, value in wanted.items() if name in found and found[name] != value]
    if changed and (held or (directory / REPORT).exists()):
        name = changed[0]
        raise ValueError(
            f"{name}: expected {found[name]!r}, with which the run in {str(directory)!r} began, got {wanted[name]!r}; "
            "name another --output"
        )
    if changed:
        (directory / SCORES_FILE).unlink(missing_ok=True)
    if {**noted, **wanted} != noted:
        write_json(directory / SETTINGS, {**noted, **wanted})


def begun_steps(directory: Path) -> int | None:
    """The steps that an interrupted run was to make, which a run that goes on with its checkpoints makes, too."""
    return _noted(directory / SETTINGS).get("steps") if last_steps(directory) else None


def _check_free(directory: Path, finished: bool) -> None:
    """Makes sure that there is no file of this name, and neither a model nor, unless it may be finished, a report."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(directory)!r}")
    if (directory / "config.json").exists():
        raise ValueError(f"{_EXPECTED}, got {str(directory)!r}, which holds a model")
    if not finished and (directory / REPORT).exists():
        raise ValueError(
            f"{_EXPECTED}, got {str(directory)!r}, whose run is finished (its model is in {str(directory / 'model')!r})"
        )


def _check_held(directory: Path, known: bool) -> list[str]:
    """Names of the checkpoints, of which there is none but in a run's directory that is known."""
    held = sorted(path.name for path in directory.glob(f"{CHECKPOINT}*"))
    if held and not known:
        raise ValueError(f"{_EXPECTED}, got {str(directory)!r}, which holds {held[0]} of another run")
    odd = set(held) - {path.name for _, path in last_steps(directory)}
    if odd:  # Trainer goes by how a name begins when it clears older checkpoints away
        raise ValueError(f"output: expected no checkpoint-* in {str(directory)!r} but checkpoints, got {min(odd)}")
    return held


def _reported(directory: Path) -> dict[str, Any]:
    """The settings that a report tells; empty if there is none that can be read."""
    try:
        return json.loads((directory / REPORT).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _noted(note: Path) -> dict[str, Any]:
    """What a run has noted of itself; empty if none has."""
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"output: expected the settings of a run in {str(note)!r}, got something else")
    return found
