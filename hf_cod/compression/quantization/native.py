"""The CPU's kernel for three bits, in C++ with AVX2, which is built on first use."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.codebook import CODEBOOKS
from hf_cod.io.native_kernel import load_native

_SOURCES = Path(__file__).with_name("csrc")
_WITHOUT = "bitsandbytes decodes them, several times slower for few tokens"


def native_kernel(planes: Tensor, block: int) -> NativeKernel | None:
    """The kernel for this matrix, or None: another device, processor or size, or it cannot be built (said once)."""
    blocks = planes.shape[1] * 8 // 3 // block
    # Eight bytes of a plane are looked up at a time, and must share a scale: of blocks of 32, whole ones do.
    fits = planes.device.type == "cpu" and planes.numel() > 0 and (block >= 64 or blocks % 4 == 0)
    return _load() if fits else None


class NativeKernel:
    """The operators of the compiled library, with the tables that they look up."""

    def __init__(self, library: Any) -> None:
        from hf_cod.compression.quantization.bnb_decoding import dynamic_code

        self._library = library
        self._dynamic_code = dynamic_code(torch.device("cpu"))
        self._codebook = torch.tensor(CODEBOOKS[3])

    def product(
        self,
        tokens: Tensor,
        planes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        bias: Tensor | None,
    ) -> Tensor:
        """tokens (T, K) times W^T, and the bias (N,): (T, N), summed in float32 and rounded once, W not at all."""
        table = None if nested_absmax is None else self._dynamic_code
        matrix = planes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.product(tokens, *matrix, bias)

    def rows(
        self,
        planes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        rows: slice,
    ) -> Tensor:
        """W (n, K) float32 of n rows."""
        table = None if nested_absmax is None else self._dynamic_code
        matrix = planes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.rows(*matrix, rows.start, rows.stop)


@cache
def _load() -> NativeKernel | None:
    if platform.machine() != "x86_64":
        return None
    library = load_native("hf_cod_3bit", _SOURCES, "3-bit layers", _WITHOUT)
    return NativeKernel(library) if library is not None and library.supported() else None
