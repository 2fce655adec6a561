"""The imports from bitsandbytes, and its encoding and decoding of scales and codes as functions of tensors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_cod.compression.quantization.scales import NESTED_BLOCK
from hf_cod.io.bitsandbytes_advice import advice_silenced

try:
    with advice_silenced():
        from bitsandbytes import matmul_4bit as matmul_4bit  # type: ignore[attr-defined]
        from bitsandbytes.functional import QuantState as QuantState
        from bitsandbytes.functional import create_dynamic_map as create_dynamic_map
        from bitsandbytes.functional import get_4bit_type as get_4bit_type
        from bitsandbytes.nn import Linear4bit as Linear4bit  # type: ignore[attr-defined]
        from bitsandbytes.nn import Params4bit as Params4bit  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "bits: storing weights in 3 or 4 bits requires the bitsandbytes package: pip install 'hf_cod[bitsandbytes]'"
    ) from error

# The dtypes to which bitsandbytes decodes.
DECODED = (torch.float32, torch.bfloat16, torch.float16)


def quantize_scales(s: Tensor, double_quant: bool = True) -> dict[str, Tensor]:
    """The tensors of `BlockScales` for scales s (n,) of any shape."""
    flat = s.flatten().float()
    if not double_quant:
        return {"absmax": flat.clone()}
    offset = flat.mean()
    centred = (flat - offset).contiguous()
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise(centred, dynamic_code(s.device), NESTED_BLOCK)
    return {"absmax": codes, "nested_absmax": nested, "offset": offset}


def dequantize_scales(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """The scales (n,) float32."""
    if nested_absmax is None or offset is None:
        return absmax
    arguments = absmax, nested_absmax, dynamic_code(absmax.device), NESTED_BLOCK, torch.float32
    return torch.ops.bitsandbytes.dequantize_blockwise(*arguments) + offset


def dequantize_nf4(b: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """W (n, K) of bytes (n, K / 2) and scales (n, K / B) float32."""
    shape = (b.shape[0], b.shape[1] * 2)
    known = dtype if dtype in DECODED else torch.float32  # for other dtypes its output is wrong
    decode = torch.ops.bitsandbytes.dequantize_4bit
    return decode(b.view(-1, 1), scales.reshape(-1), block, "nf4", shape, known).to(dtype)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """(256,) float32, the values of the codes of scales; one tensor for each device."""
    return create_dynamic_map().to(device)
