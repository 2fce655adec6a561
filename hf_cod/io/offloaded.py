"""Models whose weights stay in safetensors files: accelerate's hooks read the weights of a module when it runs.

transformers loads such a model with the device map {"": "disk"}. Here its weights can also change: a changed tensor is
read from another file, into the memory of the original one. It then has the same alignment as a tensor that was changed
in memory, on which the rounding of products depends.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from hf_cod.io.loading import weight_files
from hf_cod.io.reading import open_tensors

# The device map of a model whose weights all stay in files.
IN_FILES = {"": "disk"}
# glibc's number of the threshold (mallopt, M_MMAP_THRESHOLD), and its value here in bytes.
_MMAP_THRESHOLD, _LARGE = -3, 1 << 20


@dataclass(frozen=True)
class Place:
    """The place of a changed tensor: the key in a safetensors file, and whether it is transposed there."""

    file: Path
    key: str
    transposed: bool = False

    def read(self) -> Tensor:
        """The tensor, in memory that is mapped from the file."""
        with open_tensors(self.file, "journal", "a finished layer") as file:
            found: Tensor = file.get_tensor(self.key)
        return found.mT if self.transposed else found


class OffloadedWeights(Mapping[str, Tensor]):
    """The weights of a model by name, each read when it is used.

    Args:
        checkpoint: those of the checkpoint.
    """

    def __init__(self, checkpoint: OffloadedWeightsLoader) -> None:
        self._checkpoint = checkpoint
        self._changed: dict[str, Place] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._changed:
            intact: Tensor = self._checkpoint[name]
            return intact
        found = self._changed[name].read()
        if name in self._checkpoint.index:
            before: Tensor = self._checkpoint[name]
            if (before.shape, before.dtype) == (found.shape, found.dtype):
                return before.copy_(found)  # the mapping of the file is private
        return found.clone()

    def __contains__(self, name: object) -> bool:
        return name in self._changed or name in self._checkpoint.index

    def __iter__(self) -> Iterator[str]:
        yield from {**self._checkpoint.index, **self._changed}

    def __len__(self) -> int:
        return len({**self._checkpoint.index, **self._changed})

    def replace(self, name: str, place: Place) -> None:
        """From here on the tensor of this name is that in `place`."""
        self._changed[name] = place

    def place(self, name: str) -> tuple[Any, ...]:
        """Where a tensor is, equal for tied weights."""
        changed = self._changed.get(name)
        if changed is not None:
            return changed.file, changed.key
        told = self._checkpoint.index[name]
        return told["safetensors_file"], told.get("weight_name", name)


def weights_can_change(model: nn.Module) -> None:
    """Makes the weights of a model that transformers has offloaded to disk `OffloadedWeights`."""
    _return_freed_memory()
    weights = None
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        view = getattr(hook, "weights_map", None)
        if hook is not None and isinstance(view, PrefixedDataset):
            weights = weights or OffloadedWeights(view.dataset)
            hook.weights_map = PrefixedDataset(weights, view.prefix)


def check_offloadable(name: str, source: str, options: Mapping[str, Any], device: str, adapter: bool) -> None:
    """Checks that the weights of a model can stay in its files.

    Args:
        name: of the model, as the user gave it.
        source, options: where it is, as from `locate`.
        device: where it is to run.
        adapter: whether an adapter is to be merged with it.

    Raises:
        ValueError: they cannot; gives the reason.
    """
    if device != "cpu":
        refuse_in_files(f"device cpu, got {device}")
    if adapter:
        refuse_in_files(f"a model without adapter, got {name!r}, which is merged with its base in memory")
    if not weight_files(source, options, local=False):
        refuse_in_files(f"a checkpoint in safetensors, got {name!r}")


def refuse_in_files(obstacle: str) -> NoReturn:
    """Refuses to keep weights in files; `obstacle` says what was expected and what was got."""
    raise ValueError(f"max_memory: expected {obstacle}; or omit --max-memory")


@contextmanager
def offloading_silenced() -> Iterator[None]:
    """Without accelerate's warning that weights are offloaded, which the user asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def offloaded_weights(model: nn.Module) -> OffloadedWeights | None:
    """The weights of a model that stay in files; None if it is another model."""
    return next((view.dataset for view in map(view_of, model.modules()) if view is not None), None)


def view_of(module: nn.Module) -> PrefixedDataset | None:
    """The `OffloadedWeights` of a module, with the prefix of their names; None if it has none."""
    view = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return view if isinstance(view, PrefixedDataset) and isinstance(view.dataset, OffloadedWeights) else None


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each parameter of a model; of one that stays in a file, the tensor in there."""
    weights = offloaded_weights(model)
    for name, parameter in model.named_parameters():
        in_file = weights is not None and parameter.is_meta and name in weights
        yield name, weights[name] if weights is not None and in_file else parameter.detach()


def _return_freed_memory() -> None:
    """Makes glibc return the memory of a large tensor when that is freed.

    By itself it keeps up to 32 MiB of each freed tensor for the next, and the pieces add up to hundreds of megabytes.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _LARGE)
