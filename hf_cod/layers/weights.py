"""Reading of weights, whatever their storage: plain, offloaded, packed or quantized."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_cod.layers.orientation import shape_of, turned
from hf_cod.layers.stock_four_bit import unpacked

# Dtypes of weights that are read directly; any other weight is read through its module's forward.
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Number of columns that are decoded at a time through a module's forward.
_COLUMNS = 1024


def weight_of(module: Any) -> Tensor:
    """The weight (out, in) of a Linear-like module: its own tensor if it is plain, else decoded by its forward."""
    with align_module_device(module):
        if callable(getattr(module, "unpack", None)):  # a packed matrix; unpack is faster than its forward
            return module.unpack()
        weight: Any = getattr(module, "weight", None)
        if type(weight) in (nn.Parameter, Tensor) and weight.dtype in _PLAIN_DTYPES:
            return turned(module, weight.detach())
    with unpacked(module):
        return _decoded(module)


@torch.no_grad()
def _decoded(module: Any) -> Tensor:
    """W^T = forward(I) - forward(0), which holds for every quantized Linear, independent of its storage format."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next(t.device for t in (*module.parameters(), *module.buffers()))
    dtypes = (getattr(module, "compute_dtype", None), getattr(getattr(module, "weight", None), "dtype", None))
    dtype = next((d for d in dtypes if d in _PLAIN_DTYPES), torch.float32)
    width = shape_of(module)[1]
    offset = module(torch.zeros(1, width, device=device, dtype=dtype))
    unit_inputs = torch.eye(width, device=device, dtype=dtype).split(_COLUMNS)
    return torch.cat([(module(rows) - offset).mT for rows in unit_inputs], 1)
