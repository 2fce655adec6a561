"""Compiled kernels: built on first use, cached in Hugging Face's assets cache, optional where they cannot be built.

A shared library is code: a user who can replace the file runs code in our process. Therefore libraries are loaded only
from directories that no other user can change. If the cache is not such a directory, the library is built for this
process only and not cached.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from hf_cod.io.files import copy_aside, fingerprint
from hf_cod.io.reading import read_text

logger = logging.getLogger(__name__)


@functools.cache
def load_native(name: str, sources: Path, layers: str, without: str) -> Any:
    """`torch.ops.<name>`, or None with one warning that gives the reason.

    The first call on a machine compiles, which takes up to a minute; later calls load the library from the cache.

    Args:
        name: of the library, and of the namespace in which its sources register operators.
        sources: a directory; its `kernel.cpp` is compiled.
        layers: name, in messages, of the layers that use the kernel.
        without: the consequence of a missing kernel, for the message.
    """
    try:
        library = _cached(name, sources)
        if who := others_can_change(library):
            logger.warning(
                "%s: other users can change it; the kernel of %s is built for this process only (about half a minute). "
                "Set HF_ASSETS_CACHE to a directory that only you can write to",
                who,
                layers,
            )
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:
                _build(name, sources, Path(private) / library.name)
        elif not _loaded(library):
            logger.warning("building the kernel of %s, once (about half a minute)", layers)
            _build(name, sources, library)
    except Exception as error:  # any failure of the compiler, the linker or the disk
        logger.warning(
            "no kernel for %s: %s. Building it requires a C++ compiler (apt install g++, or xcode-select --install) "
            "and ninja (pip install ninja). Error: %s",
            layers,
            without,
            str(error).strip() or type(error).__name__,
        )
        return None
    return getattr(torch.ops, name)


def _loaded(library: Path) -> bool:
    """Loads the cached library; returns whether it exists and could be loaded. A damaged one is built again."""
    if not library.is_file():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        logger.warning("%s cannot be loaded: %s", library, error)
        return False
    return True


def others_can_change(library: Path) -> Path | None:
    """The first path among the library and its parent directories that another user can replace or write to, or None.

    The library and its directory must belong to this user and be writable by no other; the directories above must
    belong to this user or to the system. Allowed are a group with this user as its only member (the Linux default) and
    sticky directories such as /tmp.
    """
    if not hasattr(os, "getuid"):  # Windows keeps the cache in the user's own profile
        return None
    ours, folder = os.getuid(), library.parent
    # In an unprivileged container, root's files appear as those of "nobody"; the owner of / counts as the system, too.
    system = (ours, 0, os.stat("/").st_uid)
    for path in dict.fromkeys((*folder.parents, *folder.resolve().parents)):
        found = path.stat()
        if found.st_uid not in system or (_open_to_others(found) and not found.st_mode & stat.S_ISVTX):
            return path
    for path, is_kind in ((folder, stat.S_ISDIR), (library, stat.S_ISREG)):
        if os.path.lexists(path):
            found = path.lstat()
            if found.st_uid != ours or not is_kind(found.st_mode) or _open_to_others(found):
                return path
    return None


def _open_to_others(found: os.stat_result) -> bool:
    return bool(found.st_mode & (stat.S_IWOTH | (0 if _own_group(found.st_gid) else stat.S_IWGRP)))


def _own_group(group: int) -> bool:
    """Whether this user is the only member of a group."""
    import grp
    import pwd

    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _cached(name: str, sources: Path) -> Path:
    """Path of the cached library for these sources, torch version and machine type; its directory is made private."""
    texts = [read_text(path, "source") for path in sorted(sources.iterdir())]
    key = fingerprint(texts, torch.__version__, platform.machine(), sys.platform)
    folder = cached_assets_path(library_name="hf_cod", namespace="kernels", subfolder=key)
    if hasattr(os, "getuid") and folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)
    return folder / f"{name}.so"


def _build(name: str, sources: Path, library: Path) -> None:
    """Compiles and loads; the file is renamed into place, so that killed and concurrent builds leave no broken file."""
    from torch.utils import cpp_extension

    openmp = {"linux": ["-fopenmp"], "win32": ["/openmp"]}.get(sys.platform, [])
    optimize = ["/O2"] if sys.platform == "win32" else ["-O3"]
    with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder, _ninja_in_path():
        cpp_extension.load(
            name,
            [str(sources / "kernel.cpp")],
            extra_cflags=[*optimize, *openmp],
            extra_ldflags=openmp if sys.platform == "linux" else [],
            build_directory=folder,
            is_python_module=False,
        )
        built = next(path for path in Path(folder).iterdir() if path.suffix in (".so", ".pyd", ".dll"))
        copy_aside(built, library)


@contextmanager
def _ninja_in_path() -> Iterator[None]:
    """Adds the directory of the `ninja` package to PATH: the environment's bin directory may not be in it."""
    before = os.environ.get("PATH", "")
    spec = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is None and spec is not None:
        os.environ["PATH"] = os.pathsep.join([importlib.import_module("ninja").BIN_DIR, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
