"""`torch.ops.hf_cod.linear_3bit`: x W^T + b with W in three bits, as one operator that torch.compile and autograd see.

W is never whole in memory on the CPU: a few rows at a time are expanded, decoded by bitsandbytes and multiplied. The
backward pass expands them again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_cod.quantization.format import expand_planes

# Weights that are decoded at a time on the CPU: few enough to stay in the processor's cache.
_CHUNK = 1 << 20


def decoded_rows(
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, that part of W (n, K)) until all rows were there; all at once on devices other than the CPU.

    Args:
        planes: (N, 3 K / 8), of `format.pack_planes`.
        absmax, nested_absmax, offset: of `BlockScales`.
        block: weights that share a scale.
        dtype: of W.
    """
    from hf_cod.quantization.bnb import dequantize_nf4, dequantize_scales

    K = planes.shape[1] * 8 // 3
    scales = dequantize_scales(absmax, nested_absmax, offset).view(len(planes), -1)  # (N, K / B)
    step = max(1, _CHUNK // K) if planes.device.type == "cpu" else len(planes)
    for first in range(0, len(planes), step):
        rows = slice(first, min(first + step, len(planes)))
        yield rows, dequantize_nf4(expand_planes(planes[rows]), scales[rows], block, dtype)


@torch.library.custom_op("hf_cod::linear_3bit", mutates_args=())
def linear_3bit(
    x: Tensor,
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """x (..., K) times W^T, and the bias (N,): (..., N) in x's dtype. For the other arguments see `decoded_rows`."""
    tokens = x.reshape(-1, x.shape[-1])
    out = tokens.new_empty(len(tokens), len(planes))
    for rows, W in decoded_rows(planes, absmax, nested_absmax, offset, block, x.dtype):
        out[:, rows] = linear(tokens, W, None if bias is None else bias[rows])
    return out.view(*x.shape[:-1], len(planes))


@torch.library.custom_op("hf_cod::linear_3bit_backward", mutates_args=())
def linear_3bit_backward(
    grad: Tensor, planes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, block: int
) -> Tensor:
    """The gradient of x: grad (..., N) times W, which is (..., K)."""
    tokens = grad.reshape(-1, grad.shape[-1])
    # The chunks of rows add up, so float32 until all are there.
    high = torch.promote_types(grad.dtype, torch.float32)
    out = tokens.new_zeros(len(tokens), planes.shape[1] * 8 // 3, dtype=high)
    for rows, W in decoded_rows(planes, absmax, nested_absmax, offset, block, grad.dtype):
        out += tokens[:, rows] @ W
    return out.to(grad.dtype).view(*grad.shape[:-1], out.shape[1])


@linear_3bit.register_fake
def _(
    x: Tensor,
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[0])


@linear_3bit_backward.register_fake
def _(
    grad: Tensor, planes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, block: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], planes.shape[1] * 8 // 3)


def _keep(ctx, inputs, output) -> None:
    _, *tensors, block, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.block = block


def _backward(ctx, grad: Tensor):
    needs_x, *_, needs_bias = ctx.needs_input_grad
    to_x = linear_3bit_backward(grad, *ctx.saved_tensors, ctx.block) if needs_x else None
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
    return to_x, None, None, None, None, None, to_bias


linear_3bit.register_autograd(_backward, setup_context=_keep)
