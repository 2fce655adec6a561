"""8-bit moments by bitsandbytes' blockwise quantization; the only file of this folder that imports bitsandbytes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Values that share a scale, and the smallest tensor that is quantized (Dettmers et al. 2021, arXiv 2110.02861).
BLOCK = 256
LEAST = 4096


@lru_cache
def codebook(signed: bool) -> tuple[float, ...]:
    """The 256 values of the codes, in [-1, 1] (signed) or [0, 1], dense near 0.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    try:
        from hf_cod.compression.quantization.bnb_decoding import create_dynamic_map
    except ImportError as error:
        raise ImportError(
            "moments: 8bit requires the bitsandbytes package: pip install 'hf_cod[bitsandbytes]'"
        ) from error
    return tuple(create_dynamic_map(signed=signed).tolist())


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantizes float32 values to codes and scales.

    Returns:
        uint8 codes in the values' shape; float32 scales (blocks,), the largest magnitude of each block.
    """
    code = torch.tensor(codebook(signed), device=values.device)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.float().contiguous(), code, BLOCK)
    return codes.view(values.shape), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values that `encode` quantized, up to rounding; float32."""
    code = torch.tensor(codebook(signed), device=codes.device)
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, code, BLOCK, torch.float32)
