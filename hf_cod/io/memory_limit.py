"""Whether the weights of a model stay in files (`offloaded.py`), by a limit of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from hf_cod.io.loading import weight_files
from hf_cod.io.reading import open_tensors
from hf_cod.io.settings import ModelSettings

# Weights that take more than this share of the limit stay in files: the rest is for samples, sums and copies.
GIVEN, FREE = 0.5, 0.8
# Bits of the dtypes of safetensors.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of the memory of a process.

    Attributes:
        bytes: the limit.
        given: whether the user gave it; else it is what is free, and models that cannot stay in files are loaded.
    """

    bytes: int
    given: bool

    @classmethod
    def of_free(cls) -> MemoryLimit:
        """What is free."""
        return cls(psutil.virtual_memory().available, given=False)

    def exceeded(self, source: str, options: Mapping[str, Any], settings: ModelSettings, device: str) -> bool:
        """Whether the weights of a model are to stay in files.

        Args:
            source, options: of the model, as from `locate`.
            settings: what it is loaded with.
            device: where it is to run.

        Raises:
            ValueError: they are to, by a limit that the user gave, and cannot.
        """
        obstacle = None
        files = weight_files(source, options, local=False)
        if device != "cpu":
            obstacle = f"device cpu, got {device}"
        elif not files:
            obstacle = f"a checkpoint in safetensors, got {source!r}"
        if obstacle is None:
            return size_of_weights(files, settings.dtype) > self.bytes * (GIVEN if self.given else FREE)
        self.refuse(obstacle)
        return False

    def refuse(self, obstacle: str) -> None:
        """Refuses weights in files if the user gave the limit.

        Raises:
            ValueError: the user did; `obstacle` says what was expected and what was got.
        """
        if self.given:
            raise ValueError(f"max_memory: expected {obstacle}; or omit --max-memory")


def size_of_weights(files: list[str], dtype: str) -> int:
    """Bytes of the tensors in safetensors files, if they are loaded in a dtype ("auto": that in the files)."""
    total = 0
    width = None if dtype == "auto" else 8 * getattr(torch, dtype).itemsize
    for path in files:
        with open_tensors(path, "model", "a whole safetensors file") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(key)
                total += (width or _BITS.get(part.get_dtype(), 8)) * math.prod(part.get_shape()) // 8
    return total
