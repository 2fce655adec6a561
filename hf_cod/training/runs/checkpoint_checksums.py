"""Checksums of a checkpoint's files: a changed byte in weights or in the optimizer's state is valid otherwise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.files import write_json
from hf_cod.io.reading import naming_file, read_json, take_format
from hf_cod.io.schema import brief, read_record

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import TrainerCallback

CHECKSUMS = "checksums.json"
FORMAT = 1
_SUFFIXES = (".json", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class _Checksums:
    """Entries of the file."""

    sha256: dict[str, str]


def mark(checkpoint: Path) -> None:
    """Marks a checkpoint that is about to be written as ours, by an empty file of checksums."""
    if not (checkpoint / CHECKSUMS).exists():
        write_json(checkpoint / CHECKSUMS, {"format": FORMAT, "sha256": {}})


def is_marked(checkpoint: Path) -> bool:
    """Whether a checkpoint, complete or not, was written by a run of hf_cod."""
    try:
        _known(checkpoint / CHECKSUMS)
    except ValueError:
        return False
    return True


class RecordChecksums(TrainerCallback):
    """Writes the checksums of each checkpoint when all its other files are written."""

    def on_save(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Writes them."""
        if state.is_world_process_zero:
            write_checksums(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def write_checksums(checkpoint: Path) -> None:
    """Writes the checksums of the files that a run resumes from."""
    write_json(checkpoint / CHECKSUMS, {"format": FORMAT, "sha256": {p.name: _sha256(p) for p in _files(checkpoint)}})


def check_checksums(checkpoint: Path) -> None:
    """Compares the files of a checkpoint with their checksums; one of an earlier version, or of Trainer, has none, nor
    has one of a run that was killed before it wrote them.

    Raises:
        ValueError: a file is missing, new, or was changed.
    """
    path = checkpoint / CHECKSUMS
    known = _known(path) if path.exists() else {}
    if not known:
        return
    files = {p.name: p for p in _files(checkpoint)}
    other = sorted(files.keys() ^ known.keys())
    if other:
        what = "a file" if other[0] in known else "no file"
        raise ValueError(f"{brief(other[0])}: expected {what}, got {'none' if other[0] in known else 'one'}")
    for name, file in files.items():
        if _sha256(file) != known[name]:
            raise ValueError(f"{name}: expected the file as it was written, got another checksum")


def _known(path: Path) -> dict[str, str]:
    """Name -> checksum; empty in the mark of a checkpoint that was not complete."""
    content = read_json(path, path.name)
    with naming_file(path):
        return read_record(_Checksums, take_format(content, FORMAT, path.name), path.name).sha256


def _files(checkpoint: Path) -> list[Path]:
    """The files with checksums; links are refused elsewhere, and folders are those of several processes."""
    found = (p for p in checkpoint.iterdir() if p.suffix in _SUFFIXES and p.is_file() and p.name != CHECKSUMS)
    return sorted(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
