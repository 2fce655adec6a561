"""The CPU kernel for 3-bit layers, and for experts of three and four bits, in C++, compiled on first use.

It uses AVX-512 where the processor has it and the blocks fit its steps, else AVX2.
"""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.codebook import CODEBOOKS
from hf_cod.io.native_kernel import load_native

_SOURCES = Path(__file__).with_name("csrc")
# Up to this number of tokens are multiplied directly from the codes. For more, W is decoded into chunks for torch's
# product, whose own blocking (and AMX, in bfloat16) pays then. In float32 the tiles of AVX-512 are faster for any
# number (examples/benchmarks/quantization.py, 4096 x 4096).
_MOST_TOKENS, _MOST_TOKENS_AVX512_BF16 = 16, 32
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
        self.instructions: list[str] = library.instructions()
        """What this processor can run, the fastest first."""

    def most_tokens(self, codes: Tensor, block: int, dtype: torch.dtype) -> int:
        """Up to this number of tokens `product` is faster than `rows` and torch's product of them."""
        fits = self._library.fits_avx512(codes.shape[1], block, len(self._codebook) == 16)
        if dtype == torch.float32 and fits and "avx512" in self.instructions:
            return sys.maxsize
        fits = fits and dtype == torch.bfloat16 and "avx512_bf16" in self.instructions
        return _MOST_TOKENS_AVX512_BF16 if fits else _MOST_TOKENS

    def product(
        self,
        tokens: Tensor,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        bias: Tensor | None,
        instructions: str | None = None,
    ) -> Tensor:
        """tokens (T, K) times W^T plus the bias (N,): (T, N), summed in float32 and rounded once.

        W is not rounded, except to bfloat16 by AVX512-BF16 for more than two tokens in bfloat16. Without `instructions`
        the fastest are used.
        """
        table = None if nested_absmax is None else self._dynamic_code
        matrix = codes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.product(tokens, *matrix, bias, instructions)

    def rows(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block: int,
        rows: slice,
        dtype: torch.dtype = torch.float32,
        instructions: str | None = None,
    ) -> Tensor:
        """n rows of W, (n, K), rounded from float32 to dtype."""
        table = None if nested_absmax is None else self._dynamic_code
        matrix = codes, absmax, nested_absmax, offset, table, self._codebook, block
        return self._library.rows(*matrix, rows.start, rows.stop, dtype, instructions)


@cache
def _load(bits: int) -> NativeKernel | None:
    library = _library()
    return None if library is None else NativeKernel(library, bits)


@cache
def _library() -> Any:
    if platform.machine() != "x86_64":
        return None
    library = load_native("hf_cod_3bit", _SOURCES, "3-bit layers", _WITHOUT)
    return library if library is not None and library.instructions() else None
