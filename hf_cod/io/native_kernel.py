"""Compiled kernels: built on first use, kept in Hugging Face's cache, done without where they cannot be built.

A library is code, and whoever can put one where it is looked for runs it as us. So it is loaded from directories that
nobody else can change alone; where the cache is not like that, it is built for this process and kept nowhere.
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

logger = logging.getLogger(__name__)


@functools.cache
def load_native(name: str, sources: Path, layers: str, without: str) -> Any:
    """`torch.ops.<name>`, or None, which is said once and why.

    The first call on a machine compiles, which takes a minute or less; later ones load what that left in the cache.

    Args:
        name: of the library, under which its sources register their operators.
        sources: a directory; `kernel.cpp` in it is compiled.
        layers: which layers it serves, as messages call them.
        without: what becomes of these without it, as the message says it.
    """
    try:
        library = _cached(name, sources)
        if who := others_can_change(library):
            logger.warning(
                "%s: others can change it; the kernel of %s is built for this process alone (half a minute or so). Set "
                "HF_ASSETS_CACHE to a directory of your own",
                who,
                layers,
            )
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:
                _build(name, sources, Path(private) / library.name)
        elif not _loaded(library):
            logger.warning("building the kernel of %s, once: half a minute or so", layers)
            _build(name, sources, library)
    except Exception as error:  # whatever a compiler, a linker or a read-only disk may come up with
        logger.warning(
            "no kernel for %s: %s. To build it takes a C++ compiler (apt install g++, or xcode-select --install) and "
            "ninja (pip install ninja). What failed: %s",
            layers,
            without,
            str(error).strip() or type(error).__name__,
        )
        return None
    return getattr(torch.ops, name)


def _loaded(library: Path) -> bool:
    """Whether the cached library is there and fits this machine; a damaged one is built again."""
    if not library.is_file():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        logger.warning("%s cannot be loaded: %s", library, error)
        return False
    return True


def others_can_change(library: Path) -> Path | None:
    """The library, or a directory on the way to it, that another user could exchange or write to; None: there is none.

    The library and its directory must be ours and writable by nobody else, and those above ours or the system's. A
    group that is ours alone, as Linux gives to each user, and sticky directories such as /tmp do no harm.
    """
    if not hasattr(os, "getuid"):  # Windows keeps the cache in the user's own profile
        return None
    ours, folder = os.getuid(), library.parent
    # Where root's files look like nobody's, as in a container without privileges, they are the system's all the same.
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
    """Whether a group is that of this user alone."""
    import grp
    import pwd

    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _cached(name: str, sources: Path) -> Path:
    """Where the library of these sources, this torch and this kind of machine lies; the directory is ours alone."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())]
    key = fingerprint(texts, torch.__version__, platform.machine(), sys.platform)
    folder = cached_assets_path(library_name="hf_cod", namespace="kernels", subfolder=key)
    if hasattr(os, "getuid") and folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)
    return folder / f"{name}.so"


def _build(name: str, sources: Path, library: Path) -> None:
    """Compiles and loads; the file is renamed into place, so that neither a killed build nor a second one does harm."""
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
    """A virtual environment's Python finds its `ninja` package, though nobody may have put its folder into PATH."""
    before = os.environ.get("PATH", "")
    spec = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is None and spec is not None:
        os.environ["PATH"] = os.pathsep.join([importlib.import_module("ninja").BIN_DIR, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
