"""The CPU kernel for 3-bit layers, and for experts of three and four bits, in C++ with AVX2, compiled on first use."""

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
_WITHOUT = "bitsandbytes decodes them, which is several times slower for few tokens"


def native_kernel(codes: Tensor, block: int, bits: int = 3) -> NativeKernel | None:
    """The kernel for this matrix; None on another device, processor or size, or if the build fails (one warning)."""
    blocks = codes.shape[1] * 8 // bits // block
    # Eight bytes of a plane are decoded at a time and must share a scale; blocks of 32 require a multiple of four.
    fits = bits == 4 or block >= 64 or blocks % 4 == 0
    return _load(bits) if fits and codes.device.type == "cpu" and codes.numel() > 0 else None


class NativeKernel:
    """The operators of the compiled library, with their lookup tables.

    Args:
        library: the library.
        bits: of the matrices, whose codes are planes (N, 3 K / 8) or nibbles (N, K / 2).
    """

    def __init__(self, library: Any, bits: int) -> None:
        from hf_cod.compression.quantization.bnb_decoding import dynamic_code

        self._library = library
        self._dynamic_code = dynamic_code(torch.device("cpu"))
        self._codebook = torch.tensor(CODEBOOKS[bits])

    def product(
        self,
        tokens: Tensor,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        bias: Tensor | None,
    ) -> Tensor:
        """tokens (T, K) times W^T plus the bias (N,): (T, N), summed in float32 and rounded once; W is not rounded."""
        table = None if nested_absmax is None else self._dynamic_code
        matrix = codes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.product(tokens, *matrix, bias)

    def rows(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        rows: slice,
    ) -> Tensor:
        """n rows of W, (n, K) float32."""
        table = None if nested_absmax is None else self._dynamic_code
        matrix = codes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.rows(*matrix, rows.start, rows.stop)


@cache
def _load(bits: int) -> NativeKernel | None:
    library = _library()
    return None if library is None else NativeKernel(library, bits)


@cache
def _library() -> Any:
    if platform.machine() != "x86_64":
        return None
    library = load_native("hf_cod_3bit", _SOURCES, "3-bit layers", _WITHOUT)
    return library if library is not None and library.supported() else None
