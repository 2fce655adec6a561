"""The targets of `export`, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hf_cod.compression.export import auto_round, compressed_tensors, exl3, gptqmodel, llama_cpp, mlx
from hf_cod.compression.export.plan import Size
from hf_cod.compression.export.request import Request, Written, group_scaled, undivided

Stored = Callable[[Size, int, "int | None", int], int]
"""((out, in), width, group, bits of a scale in the model's dtype) -> bits of a matrix in a file."""


def _width(size: Size, width: int) -> int:
    return width


@dataclass(frozen=True)
class Target:
    """An engine or file format.

    Attributes:
        name: its name in `settings.TARGETS`.
        widths: the nominal bits that it has, rising.
        write: writes the files of an export to its output directory.
        stored: size of a matrix in a file, scales included.
        reason: (size, group) -> why a matrix cannot be quantized, or None.
        grouped: whether the size of groups with one scale can be chosen.
        fuses: whether matrices with the same input must have one width.
        rounds: whether `write` rounds the weights of the model, with error compensation if there are batches.
        weighted: whether `write` takes statistics of the inputs.
        grid: (size, width) -> bits of the uniform grid that stands for its rounding, in a search.
    """

    name: str
    widths: tuple[int, ...]
    write: Callable[[Request], Written]
    stored: Stored
    reason: Callable[[Size, int | None], str | None] = undivided
    grouped: bool = True
    fuses: bool = False
    rounds: bool = False
    weighted: bool = False
    grid: Callable[[Size, int], int] = _width


def _grouped(more: int | None, size: Size, width: int, group: int | None, scale_bits: int) -> int:
    assert group is not None
    return group_scaled(size, width, group, scale_bits if more is None else more)


# GPTQ stores a scale in 16 bits and a zero point in the width of the codes, which is 4 here.
_GPTQ = partial(_grouped, 16 + 4)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "compressed-tensors",
            compressed_tensors.WIDTHS,
            compressed_tensors.write,
            partial(_grouped, None),
            fuses=True,
            rounds=True,
        ),
        Target(
            "llama.cpp",
            llama_cpp.WIDTHS,
            llama_cpp.write,
            llama_cpp.stored,
            llama_cpp.reason,
            grouped=False,
            weighted=True,
            grid=llama_cpp.grid,
        ),
        Target("gptqmodel", gptqmodel.WIDTHS, gptqmodel.write, _GPTQ, fuses=True),
        Target("auto-round", auto_round.WIDTHS, auto_round.write, _GPTQ, fuses=True),
        Target("mlx", mlx.WIDTHS, mlx.write, partial(_grouped, mlx.SCALE_BITS)),
        Target("exl3", exl3.WIDTHS, exl3.write, exl3.stored, exl3.reason, grouped=False),
    )
}
