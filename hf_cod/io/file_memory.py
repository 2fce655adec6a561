"""Memory of weights in files, so that the system frees it when it needs room (Linux).

safetensors maps the weights that transformers does not convert while loading. The system reads such pages again from
the checkpoint whenever it dropped them. Pages of changed weights have no file: here they get one without a name, at
the same addresses, so that tensors, their views and their alignment stay as they are, and so do all results.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

_PAGEOUT = 21  # MADV_PAGEOUT of Linux, which the mmap module does not name
_FIXED = 0x10  # MAP_FIXED
_LEAST = 1 << 16  # bytes; smaller tensors stay in memory


class FileMemory:
    """Keeps the resident memory of this process near a limit.

    Args:
        directory: where changed weights are written. Their files have no name: they vanish with the process.
        limit: bytes of resident memory above which weights that were used are dropped from it.
    """

    def __init__(self, directory: str | Path, limit: int) -> None:
        self._directory, self._limit = Path(directory), limit
        self._used: dict[int, int] = {}  # first page -> end

    def move(self, tensors: Iterable[Tensor]) -> None:
        """Moves the whole pages of these tensors to a file; the tensors are the same afterwards.

        Raises:
            OSError: the file cannot be written or mapped; the tensors are as they were.
        """
        spans = merged(span for span in map(pages_of, tensors) if span[1] - span[0] >= _LEAST)
        if not spans:
            return
        with tempfile.TemporaryFile(dir=self._directory) as file:
            for start, end in spans:
                file.write(memoryview((ctypes.c_char * (end - start)).from_address(start)))
            file.flush()
            os.fsync(file.fileno())  # the system drops written pages only
            place = 0
            for start, end in spans:
                _map(start, end - start, file.fileno(), place)
                place += end - start
        self._used.update(spans)
        self._drop()

    def use(self, module: nn.Module, *_: Any) -> None:
        """Notes the module's own weights as used; drops what was used if the limit is exceeded."""
        for tensor in module.parameters(recurse=False):
            start, end = pages_of(tensor)
            if end - start >= _LEAST:
                self._used[start] = max(end, self._used.get(start, 0))
        self._drop()

    def _drop(self) -> None:
        """Drops what was used from memory if the limit is exceeded."""
        if self._used and resident() > self._limit:
            for start, end in self._used.items():
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
            self._used.clear()


_CURRENT: ContextVar[FileMemory | None] = ContextVar("file_memory", default=None)


@contextmanager
def weights_in_files(directory: str | Path, limit: int) -> Iterator[None]:
    """In the block, changed layers are moved to files in `directory`, and weights that were used are dropped from
    memory whenever the process holds more than `limit` bytes. Results are those of the same work without it.

    Raises:
        ValueError: a system other than Linux.
    """
    if sys.platform != "linux":
        raise ValueError(f"max_memory: expected Linux, got {sys.platform}; omit it")
    memory = FileMemory(directory, limit)
    token, hook = _CURRENT.set(memory), register_module_forward_hook(memory.use)
    try:
        yield
    finally:
        hook.remove()
        _CURRENT.reset(token)


def move_to_file(tensors: Iterable[Tensor]) -> None:
    """Moves tensors to a file within `weights_in_files`; elsewhere does nothing."""
    memory = _CURRENT.get()
    if memory is not None:
        memory.move(tensors)


def pages_of(tensor: Tensor) -> tuple[int, int]:
    """First address and end of the whole memory pages that a tensor covers; (0, 0) if there are none.

    The span of a view with gaps would cover the memory of other tensors: it has none, either.
    """
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if last + 1 != tensor.numel():
        return 0, 0
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    return (start, end) if end > start else (0, 0)


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that overlap as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _map(start: int, size: int, file: int, place: int) -> None:
    """Replaces pages by those of a file; changes of them stay private."""
    arguments = (ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE)
    found = _libc().mmap(*arguments, mmap.MAP_PRIVATE | _FIXED, file, ctypes.c_long(place))
    if found != start:
        raise OSError(ctypes.get_errno(), f"memory: expected {size} bytes of a file, got an error of mmap")


def _libc() -> Any:
    found = ctypes.CDLL(None, use_errno=True)
    found.mmap.restype = ctypes.c_void_p
    return found
