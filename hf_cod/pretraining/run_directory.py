"""A run's directory: whose it is, and its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cod.files import write_json
from hf_cod.pretraining.recipes import PretrainSettings

CHECKPOINT = "checkpoint-"
SETTINGS = "settings.json"
# What may differ when a run goes on: it decides when something is written, or memory and speed, not what is learnt.
FREE = ("output", "micro_batch_size", "compile", "save_every", "evaluate_every", "diagnose_every", "log_every")


def claim(settings: PretrainSettings) -> None:
    """Marks the output directory as this run's, so that no other run goes on from its checkpoints or takes its report.

    Raises:
        ValueError: it holds checkpoints or the report of a run with other settings, or on a text of another size.
    """
    folder = Path(str(settings.output))
    told = {name: value for name, value in settings.describe().items() if name not in FREE}
    wanted = json.loads(json.dumps({**told, "text_size": text_size(settings.recipe.text)}))
    found = _settings_of(folder)
    if found and (last_steps(folder) or (folder / "report.json").is_file()):
        for name, value in wanted.items():
            if name in found and found[name] != value:
                raise ValueError(
                    f"{name}: expected {found[name]!r}, with which the run in {str(folder)!r} was made, got {value!r}; "
                    "name another --output, or remove that one"
                )
    if found != wanted:
        write_json(folder / SETTINGS, wanted)


def text_size(text: str | None) -> list[Any]:
    """Bytes of a local text; of a directory those of each file, by name. Empty for a data set of the Hub."""
    path = Path(text or "")
    if text and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [[file.relative_to(path).as_posix(), file.stat().st_size] for file in files]
    return [path.stat().st_size] if text and path.is_file() else []


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


def _settings_of(folder: Path) -> dict[str, Any]:
    """What the directory's run was told: its own note, or its report's."""
    for file, key in ((SETTINGS, None), ("report.json", "settings")):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            return content if key is None else content[key]
        except (OSError, ValueError, KeyError):
            continue
    return {}
