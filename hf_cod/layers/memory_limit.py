"""A limit of the memory of the process, for a model whose weights stay in files: what the work needs, and its peak."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from hf_cod.io.offloaded import view_of
from hf_cod.io.text import Batch
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.parts import units_of
from hf_cod.layers.stack import DecoderLayers

# Bytes of what does not grow with the model: rows of a matrix on which formulas work at a time, libraries that are
# loaded on first use, and freed memory that the allocator keeps.
FIXED = 250_000_000
_FLOAT32 = 4


@dataclass(frozen=True)
class Copies:
    """What the change of one matrix takes beside its weights.

    Attributes:
        bytes: of temporary tensors, for each weight of the matrix.
        products: whether it uses X^T X of its inputs; else their sums have the size of a row.
    """

    bytes: int
    products: bool = False


# Of scores of outliers, and of pruning by magnitude, which sorts the weights of a matrix.
SCORED = Copies(22)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that the process takes at the peak of the work.

    Attributes:
        process: Python, its libraries and what is loaded already.
        layer: the weights of the largest layer.
        sums: of the inputs of one layer.
        copies: of one matrix and its sums.
        outputs: of one batch, in one layer.
        others: the largest weights outside of the layers, with the outputs of one batch; not at the same time as a
            layer.
    """

    process: int
    layer: int
    sums: int
    copies: int
    outputs: int
    others: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.process + FIXED + max(self.layer + max(self.sums + self.copies, self.outputs), self.others)

    def check(self, limit: int) -> None:
        """Checks a limit in bytes.

        Raises:
            ValueError: it cannot be kept; says what takes how much.
        """
        if self.total > limit:
            parts = {
                "the process with its libraries": self.process + FIXED,
                "the largest layer": self.layer,
                "sums of its inputs": self.sums,
                "copies of one matrix": self.copies,
                "outputs of one batch in a layer": self.outputs,
                "the largest matrix outside of the layers with its outputs": self.others,
            }
            told = ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items())
            raise ValueError(
                f"max_memory: expected at least {math.ceil(self.total / 1e7) / 100:.2f}GB, got {limit / 1e9:.2f}GB "
                f"({told})"
            )


class MemoryLimit:
    """A limit of the memory of the process.

    Args:
        limit: in bytes; None: without a limit, nothing is checked or reported.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._needed = limit, 0

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    def check(self, stack: DecoderLayers, batches: Sequence[Batch], copies: Copies) -> None:
        """Checks that the limit can be kept; for the arguments see `memory_need`.

        Raises:
            ValueError: it cannot.
        """
        if self._limit is not None:
            need = memory_need(stack, batches, copies)
            need.check(self._limit)
            self._needed = need.total

    def results(self) -> dict[str, dict[str, int]]:
        """`memory_limit` of a report's results: the limit, what was needed, and the peak so far."""
        if self._limit is None:
            return {}
        told = {"limit_bytes": self._limit, "needed_bytes": self._needed, "peak_bytes": peak_bytes()}
        return {"memory_limit": told}


def memory_need(stack: DecoderLayers, batches: Sequence[Batch], copies: Copies) -> MemoryNeed:
    """What work on a model takes whose weights stay in files; from shapes alone, so that no weights are read.

    Args:
        stack: the layers.
        batches: all samples, of which the largest batch counts.
        copies: what the change of one matrix takes.
    """
    inputs = [value for batch in batches for value in batch.values() if isinstance(value, Tensor)]
    tokens = max((math.prod(value.shape[:2]) for value in inputs), default=0)
    size = max((p.element_size() for p in stack.model.parameters()), default=_FLOAT32)
    layers = [_shapes(stack, index) for index in range(len(stack))]
    return MemoryNeed(
        process=psutil.Process().memory_info().rss,
        layer=max(_nbytes(stack[index]) for index in range(len(stack))),
        sums=max(_products(shapes) for shapes in layers) if copies.products else 0,
        copies=max((_copies(shape, copies) for shapes in layers for shape in shapes.values()), default=0),
        outputs=max(2 * size * tokens * sum(shape[-2] for shape in shapes.values()) for shapes in layers),
        others=max((_other(module, tokens) for module in _outside(stack)), default=0),
    )


def peak_bytes() -> int:
    """The most memory that the process has taken since its start."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where the rusage of a process includes that of its parent before exec
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # here, because Windows does not have it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def above_limit(results: Mapping[str, Any]) -> list[str]:
    """A note for a report if, by its results, the process took more than its limit, else none."""
    told = results.get("memory_limit")
    if told is None or told["peak_bytes"] <= told["limit_bytes"]:
        return []
    peak, limit, needed = (told[key] / 1e9 for key in ("peak_bytes", "limit_bytes", "needed_bytes"))
    return [f"the process took {peak:.2f} GB, more than max_memory, {limit:.2f} GB; {needed:.2f} GB were expected"]


def _shapes(stack: DecoderLayers, index: int) -> dict[str, tuple[int, ...]]:
    """Name -> (out, in) of each matrix of a layer, (experts, out, in) of each bank."""
    found: dict[str, tuple[int, ...]] = {name: shape_of(module) for name, module in stack.linears(index).items()}
    return found | {matrix.name: (matrix.experts, *matrix.shape) for matrix in stack.expert_matrices(index)}


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _products(shapes: dict[str, tuple[int, ...]]) -> int:
    """X^T X of each input: the matrices that engines fuse have the same one."""
    inputs = [shapes[unit[0]] for unit in units_of(shapes, fuses=True)]
    return sum(_FLOAT32 * math.prod(shape[:-2]) * shape[-1] ** 2 for shape in inputs)


def _copies(shape: tuple[int, ...], copies: Copies) -> int:
    """Of a matrix, or one of the experts of a bank: of its weights, and thrice X^T X, to factorize that."""
    weights, products = copies.bytes * math.prod(shape[-2:]), _FLOAT32 * shape[-1] ** 2
    return max(weights + products, _FLOAT32 * math.prod(shape[-2:]) + 3 * products) if copies.products else weights


def _outside(stack: DecoderLayers) -> list[nn.Module]:
    """The modules outside of the layers whose weights stay in files."""
    inside = {id(module) for layer in stack for module in layer.modules()}
    return [module for module in stack.model.modules() if id(module) not in inside and view_of(module) is not None]


def _other(module: nn.Module, tokens: int) -> int:
    """Bytes of a module with its outputs: those of a head as they are, in float32, and their logarithms."""
    own = list(module.parameters(recurse=False))
    rows = max((p.shape[0] for p in own if p.dim() == 2), default=0)
    return sum(p.nbytes for p in own) + 3 * _FLOAT32 * tokens * rows
