"""The directory of a training run: its identity and its newest checkpoint.

`io/output_directory.py` has the parts that are common to the directories of all commands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_cod.io.files import write_json
from hf_cod.io.module_names import without_unset
from hf_cod.io.output_checks import check_place, is_temporary
from hf_cod.io.output_manifest import JOURNAL, remove
from hf_cod.io.reading import as_read, naming_file, read_json
from hf_cod.io.schema import check_value, limits
from hf_cod.training.runs.checkpoint_checksums import is_marked
from hf_cod.training.runs.checkpoint_files import is_state_alone, newest_whole

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
_OF_CHECKPOINTS = (".bin", ".json", ".pt", ".pth", ".safetensors")  # suffixes of files
SETTINGS, SCORES_FILE, REPORT = "settings.json", "scores.json", "report.json"
SCORES_NOTE = "scores_checksum"  # entry of the settings
ANSWERS_NOTE = "answers_by"  # the same; runs on chats of earlier versions have none
# Entries that a run notes after its identity: alone, they are of a run whose directory was deleted meanwhile.
_LATE = {"steps", SCORES_NOTE, ANSWERS_NOTE}
MARKERS = ("trainer_state.json", "progress.json")  # last file of a checkpoint: Trainer's, and our own loop's
# Name of a setting in runs of an earlier version -> its current name.
RENAMED = {"labels": "label_weight", "hidden": "hidden_weight"}
_EXPECTED = "output: expected a new directory, or that of an interrupted run"


def last_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, the newest first; ignores files and folders that only have a similar name."""
    named = [(path.name.removeprefix(CHECKPOINT), path) for path in Path(directory).glob(f"{CHECKPOINT}[0-9]*")]
    return sorted(((int(step), path) for step, path in named if step.isdecimal() and path.is_dir()), reverse=True)


def last_checkpoint(directory: str | Path, marker: str, check: Callable[[Path, int], object]) -> Path | None:
    """The newest complete checkpoint, to resume from; logs a warning for each newer damaged one.

    Args:
        directory: the run's directory.
        marker: the file that is written last; if it is missing, the process died while it wrote the checkpoint.
        check: raises ValueError if the files of a (folder, step) are damaged or not those of this run.
    """
    written = [(step, path) for step, path in last_steps(directory) if (path / marker).is_file()]
    damaged: list[tuple[Path, str]] = []
    found = newest_whole(written, lambda path, why: damaged.append((path, why)), check)
    for path, why in damaged:
        resumed = "training starts from step 0" if found is None else f"training resumes from {found.name}"
        logger.warning("%s is damaged (%s): %s", path, why, resumed)
    return found


def half_checkpoints(directory: Path) -> list[Path]:
    """Incomplete checkpoints of a run, without the file that is written last: the run ended while it wrote them."""
    if not _noted(directory / SETTINGS):
        return []
    return [path for _, path in last_steps(directory) if not any((path / marker).exists() for marker in MARKERS)]


def lost_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run whose directory was deleted meanwhile, with the scores and settings that it noted since:
    without its identity, it cannot be resumed.
    """
    noted = _noted(directory / SETTINGS)
    if noted.keys() - _LATE:
        return []
    late = [SETTINGS] if noted else []
    late += [SCORES_FILE] if SCORES_NOTE in noted else []
    named = [directory / name for name in late if (directory / name).is_file()]
    return [*(path for _, path in last_steps(directory)), *named]


def _left_by_lost_run(directory: Path) -> list[Path]:
    """As `lost_checkpoints`, of a run that was killed afterwards; empty if there might be anything of somebody else."""
    if not directory.is_dir():
        return []
    left = lost_checkpoints(directory)
    others = {path.name for path in directory.iterdir() if not is_temporary(path)} - {JOURNAL, *(p.name for p in left)}
    ours = all(is_marked(path) or is_state_alone(path) for path in left if path.is_dir())
    return left if ours and not others and not any(path.is_symlink() for path in left) else []


def claim(directory: Path, wanted: dict[str, Any], *, finished: bool = False) -> None:
    """Marks a directory as this run's by writing its identity to `settings.json`; entries written earlier are kept.

    A run that ended before its first checkpoint cannot be resumed, so a run with other settings may replace it. What a
    run has written after its directory was deleted is removed, with a warning.

    Args:
        directory: the run's directory, which need not exist.
        wanted: the identity of the run, as JSON values.
        finished: whether the same run may claim the directory again after it has finished. The settings in its report
            are then compared, too; a setting that an earlier version did not write matches every value.

    Raises:
        ValueError: the directory is that of another run, of a finished run, or of a model; it holds checkpoints of
            another run, or other files named like checkpoints; or it is a file.
    """
    changed = check_claim(directory, wanted, finished=finished)
    left = _left_by_lost_run(directory)
    if left:
        names = ", ".join(path.name for path in left)
        logger.warning("%s has %s of a run whose directory was deleted: the run begins anew", directory, names)
        for path in left:
            remove(path)
    if changed:
        (directory / SCORES_FILE).unlink(missing_ok=True)
        wanted = {SCORES_NOTE: None, **wanted}
    note(directory, wanted)


def note(directory: Path, entries: dict[str, Any]) -> None:
    """Adds entries to those that the run has noted."""
    noted = _noted(directory / SETTINGS)
    changed = {**noted, **as_read(entries)}
    if changed != noted:
        write_json(directory / SETTINGS, changed)


def noted_scores(directory: Path) -> str | None:
    """The checksum of the scores that the run has noted; None if it has not, or an earlier version began it.

    Raises:
        ValueError: the note is damaged.
    """
    noted = _noted(directory / SETTINGS)
    with naming_file(directory / SETTINGS):
        return check_value(noted.get(SCORES_NOTE), str | None, SCORES_NOTE)


@contextmanager
def claiming(directory: Path, wanted: dict[str, Any]) -> Iterator[None]:
    """Claims a directory for a block. A new run whose input is refused before it has written anything leaves no claim.

    Raises:
        ValueError: as `claim`.
    """
    new = not (directory / SETTINGS).exists()
    claim(directory, wanted)
    try:
        yield
    except ValueError:
        if new and not last_steps(directory) and not (directory / SCORES_FILE).exists():
            (directory / SETTINGS).unlink(missing_ok=True)
        raise


def check_claim(directory: Path, wanted: dict[str, Any], *, finished: bool = False) -> list[str]:
    """Checks whether `claim` would accept the directory; returns the names of the settings that it would change.

    Raises:
        ValueError: as `claim`.
    """
    _check_free(directory, finished)
    wanted = as_read(wanted)
    noted = {} if _left_by_lost_run(directory) else _noted(directory / SETTINGS)
    found = noted or (_reported(directory) if finished else {})
    known = bool(found) if finished else without_unset(wanted).keys() - {ANSWERS_NOTE} <= found.keys()
    held = _check_held(directory, known or bool(_left_by_lost_run(directory)))
    changed = [name for name, value in wanted.items() if name in found and not _is_same(found[name], value)]
    if changed and (held or (directory / REPORT).exists()):
        name = changed[0]
        raise ValueError(
            f"{name}: expected {found[name]!r}, as in the run in {str(directory)!r}, got {wanted[name]!r}; set another "
            "--output"
        )
    return changed


def _is_same(noted: Any, wanted: Any) -> bool:
    """Whether a setting is the same; 0 and 1 are not false and true, which are equal to them."""
    return bool(noted == wanted) and isinstance(noted, bool) == isinstance(wanted, bool)


def begun_steps(directory: Path) -> int | None:
    """The number of steps of an interrupted run; a run that resumes from its checkpoints makes as many.

    Raises:
        ValueError: the note is damaged.
    """
    if not last_steps(directory) or _left_by_lost_run(directory):
        return None
    noted = _noted(directory / SETTINGS)
    with naming_file(directory / SETTINGS):
        return check_value(noted.get("steps"), int | None, "steps", limits(least=1))


def _check_free(directory: Path, finished: bool) -> None:
    """Raises if the directory holds a model, or a report (unless `finished`)."""
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
    """Names of the checkpoints; raises if they are of an unknown run, or if another name begins with checkpoint-."""
    held = sorted(path.name for path in directory.glob(f"{CHECKPOINT}*"))
    if held and not known:
        raise ValueError(f"{_EXPECTED}, got {str(directory)!r}, which holds {held[0]} of another run")
    odd = set(held) - {path.name for _, path in last_steps(directory)}
    if odd:  # Trainer deletes older checkpoints by the prefix of their names
        raise ValueError(f"output: expected only checkpoints named checkpoint-* in {str(directory)!r}, got {min(odd)}")
    for name in held:
        _check_kinds(directory / name)
    return held


def _check_kinds(checkpoint: Path) -> None:
    """Checks that files of a checkpoint are files; Trainer writes the checkpoint of the same step over them.

    Raises:
        ValueError: there is a link, which would be written through, or a directory with the name of a file.
    """
    for path in (checkpoint, *checkpoint.rglob("*")):
        kind = "a link" if path.is_symlink() else "no file"
        if path.is_symlink() or (path.suffix in _OF_CHECKPOINTS and not path.is_file()):
            raise ValueError(f"output: expected the files of a checkpoint, got {str(path)!r}, {kind}; remove it")


def _reported(directory: Path) -> dict[str, Any]:
    """The settings in the report; empty if there is no readable report."""
    try:
        return check_value(read_json(directory / REPORT, "report")["settings"], dict[str, Any], "settings")
    except (ValueError, KeyError, TypeError):
        return {}


def _noted(note: Path) -> dict[str, Any]:
    """The identity that a run has written, by the current names of settings; empty if there is none."""
    if not note.is_file():
        return {}
    found = read_json(note, "settings")
    with naming_file(note):
        noted: dict[str, Any] = check_value(found, dict[str, Any], "settings")
        return {RENAMED.get(name, name): value for name, value in noted.items()}
