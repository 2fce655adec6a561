"""What is particular to a training's directory: whose run it is, and its newest checkpoint.

All else that is true of the directories of commands is in `io/output_directory.py`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hf_cod.io.files import write_json
from hf_cod.io.output_checks import check_place
from hf_cod.io.reading import naming_file, read_json
from hf_cod.io.schema import check_value
from hf_cod.training.runs.checkpoint_files import newest_whole

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
SETTINGS, SCORES_FILE, REPORT = "settings.json", "scores.json", "report.json"
MARKERS = ("trainer_state.json", "progress.json")  # written last of a checkpoint, by Trainer and by our own loop
_EXPECTED = "output: expected a new directory, or that of an interrupted run"


def last_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, the newest first; what is only named like one does not count."""
    named = [(path.name.removeprefix(CHECKPOINT), path) for path in Path(directory).glob(f"{CHECKPOINT}[0-9]*")]
    return sorted(((int(step), path) for step, path in named if step.isdecimal() and path.is_dir()), reverse=True)


def last_checkpoint(directory: str | Path, marker: str) -> Path | None:
    """The newest checkpoint that a training can go on from; warns of those that are newer and damaged.

    Args:
        directory: the run's.
        marker: the file that is written last: where it is missing, the process died while it wrote the checkpoint.
    """
    written = [(step, path) for step, path in last_steps(directory) if (path / marker).is_file()]
    damaged: list[tuple[Path, str]] = []
    found = newest_whole(written, marker, lambda path, why: damaged.append((path, why)))
    for path, why in damaged:
        resumed = "the training begins anew" if found is None else f"the training resumes from {found.name}"
        logger.warning("%s is damaged (%s): %s", path, why, resumed)
    return found


def half_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run that lack what is written last: those that were being written when the run ended."""
    if not _noted(directory / SETTINGS):
        return []
    return [path for _, path in last_steps(directory) if not any((path / marker).exists() for marker in MARKERS)]


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
    changed = check_claim(directory, wanted, finished=finished)
    if changed:
        (directory / SCORES_FILE).unlink(missing_ok=True)
    noted, wanted = _noted(directory / SETTINGS), json.loads(json.dumps(wanted))
    if {**noted, **wanted} != noted:
        write_json(directory / SETTINGS, {**noted, **wanted})


def check_claim(directory: Path, wanted: dict[str, Any], *, finished: bool = False) -> list[str]:
    """Makes sure that `claim` may make the directory this run's; returns the names of settings that it would change.

    Raises:
        ValueError: as `claim`.
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
    return changed


def begun_steps(directory: Path) -> int | None:
    """The steps that an interrupted run was to make, which a run that goes on with its checkpoints makes, too."""
    return _noted(directory / SETTINGS).get("steps") if last_steps(directory) else None


def _check_free(directory: Path, finished: bool) -> None:
    """Makes sure that there is neither a model nor, unless it may be finished, a report."""
    check_place(directory)
    reported, model = (directory / REPORT).exists(), (directory / "config.json").exists()
    if reported and not finished:
        # Until 0.2 trainings wrote their model into a directory of its own.
        earlier = directory / "model"
        where = earlier if earlier.is_dir() and not model else directory
        raise ValueError(f"{_EXPECTED}, got {str(directory)!r}, whose run is finished (its model is in {str(where)!r})")
    if model and not (reported and (directory / SETTINGS).exists()):
        raise ValueError(f"{_EXPECTED}, got {str(directory)!r}, which holds a model")


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
        return check_value(read_json(directory / REPORT, "report")["settings"], dict[str, Any], "settings")
    except (ValueError, KeyError, TypeError):
        return {}


def _noted(note: Path) -> dict[str, Any]:
    """What a run has noted of itself; empty if none has."""
    if not note.is_file():
        return {}
    found = read_json(note, "settings")
    with naming_file(note):
        return check_value(found, dict[str, Any], "settings")
