"""File systems of their own, in memory and as small as a test wants, where the system lets us have them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def can_mount() -> bool:
    """Whether a file system can be mounted here."""
    if shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        tried = _mount(folder, 1 << 20)
        if tried.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)
    return tried.returncode == 0


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """A new directory on a disk of so many bytes."""
    directory.mkdir()
    _mount(directory, size).check_returncode()
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def resize(directory: Path, size: int) -> None:
    """Gives such a disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(directory)], check=True)


def _mount(directory: str | Path, size: int) -> subprocess.CompletedProcess:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "hf-cod", str(directory)]
    return subprocess.run(command, capture_output=True)
