"""Compiled kernels: built on first use, kept in Hugging Face's cache, done without where they cannot be built."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
import shutil
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
        if not _loaded(library):
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


def _cached(name: str, sources: Path) -> Path:
    """Where the library of these sources, this torch and this kind of machine lies."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())]
    key = fingerprint(texts, torch.__version__, platform.machine(), sys.platform)
    return cached_assets_path(library_name="hf_cod", namespace="kernels", subfolder=key) / f"{name}.so"


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
