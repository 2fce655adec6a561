"""`torch.ops.hf_cod.linear_3bit`: x W^T + b with W in three bits, as one operator for torch.compile and autograd.

Few tokens are multiplied directly from the planes: on the CPU by `native`, on CUDA by `triton_kernel`, if they can be
built. For more tokens, and without these kernels, W is decoded; on the CPU a few rows at a time, never the full matrix.
The backward pass decodes W again instead of keeping it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_cod.compression.quantization.format import expand_planes
from hf_cod.compression.quantization.native import native_kernel

# Up to this number of tokens are multiplied directly from the planes on CUDA; on the CPU see `native`.
MOST_TOKENS = 16
Scales = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""(absmax, nested_absmax, offset), as `BlockScales` returns them."""

_FAST = (torch.float32, torch.bfloat16, torch.float16)
# Number of weights that are decoded at a time on the CPU: few enough to stay in the processor's cache.
_CHUNK = 1 << 20


def decoded_rows(
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    dtype: torch.dtype,
    bits: int = 3,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice of rows, these rows of W (n, K)) for all rows; all at once on devices other than the CPU.

    Args:
        planes: (N, 3 K / 8), of `format.pack_planes`; of four bits (N, K / 2), of `format.pack_nibbles`.
        absmax, nested_absmax, offset: of `BlockScales`.
        block: number of weights that share a scale.
        dtype: of W.
        bits: of the codes.
    """
    from hf_cod.compression.quantization.bnb_decoding import dequantize_nf4, dequantize_scales

    K = planes.shape[1] * 8 // bits
    kernel = native_kernel(planes, block, bits)
    scales = None if kernel else dequantize_scales(absmax, nested_absmax, offset).view(len(planes), -1)  # (N, K / B)
    on_cpu = planes.device.type == "cpu"
    step = max(1, _CHUNK // K) if on_cpu else len(planes)
    # On the CPU, bitsandbytes decodes to half precision element by element: several times slower, with the same result.
    decoded = torch.float32 if on_cpu else dtype
    for first in range(0, len(planes), step):
        rows = slice(first, min(first + step, len(planes)))
        if kernel:
            W = kernel.rows(planes, absmax, nested_absmax, offset, block, rows, dtype)
        else:
            assert scales is not None
            nibbles = expand_planes(planes[rows]) if bits == 3 else planes[rows]
            W = dequantize_nf4(nibbles, scales[rows], block, decoded)
        yield rows, W.to(dtype)


def decoded_matrix(codes: Tensor, scales: Scales, bits: int, block: int, dtype: torch.dtype) -> Tensor:
    """W (N, K) of codes of three bits (N, 3 K / 8) or of four (N, K / 2)."""
    return torch.cat([W for _, W in decoded_rows(codes, *scales, block, dtype, bits)])


def multiply(
    x: Tensor,
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """x (..., K) times W^T plus the bias (N,): (..., N) in x's dtype. For the other arguments see `decoded_rows`.

    The operator `linear_3bit` without its overhead.
    """
    return multiply_codes(x, planes, (absmax, nested_absmax, offset), block, bias, 3)


def multiply_codes(x: Tensor, codes: Tensor, scales: Scales, block: int, bias: Tensor | None, bits: int) -> Tensor:
    """`multiply` for codes of three bits or of four, see `decoded_rows`."""
    tokens = x.reshape(-1, x.shape[-1])
    product = _direct_product(tokens, codes, block, bits)
    if product:
        out = product(tokens, codes, *scales, block, bias)
    else:
        out = tokens.new_empty(len(tokens), len(codes))
        for rows, W in decoded_rows(codes, *scales, block, x.dtype, bits):
            if bias is None:
                torch.mm(tokens, W.mT, out=out[:, rows])
            else:
                torch.addmm(bias[rows], tokens, W.mT, out=out[:, rows])
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(codes))


def _direct_product(tokens: Tensor, codes: Tensor, block: int, bits: int) -> Callable[..., Tensor] | None:
    """The kernel that multiplies without decoding W; None if there is none for this size, dtype and device."""
    if len(tokens) == 0 or tokens.dtype not in _FAST:
        return None
    if tokens.is_cuda and bits == 3 and len(tokens) <= MOST_TOKENS and _has_triton():
        from hf_cod.compression.quantization.triton_kernel import product

        return product
    kernel = native_kernel(codes, block, bits)
    return kernel.product if kernel and len(tokens) <= kernel.most_tokens(codes, block, tokens.dtype) else None


def has_grouped_kernel(tokens: Tensor) -> bool:
    """Whether `triton_experts` multiplies these tokens: on CUDA, without a gradient, in a dtype of its own."""
    learns = tokens.requires_grad and torch.is_grad_enabled()
    return tokens.is_cuda and tokens.dtype in _FAST and not learns and len(tokens) > 0 and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


linear_3bit = torch.library.custom_op("hf_cod::linear_3bit", multiply, mutates_args=())


def linear(x: Tensor, planes: Tensor, scales: Scales, block: int, bias: Tensor | None = None) -> Tensor:
    """The product, by the operator only for autograd and torch.compile: its overhead is as long as a small product."""
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not (learns or torch.compiler.is_compiling()):
        return multiply(x, planes, *scales, block, bias)
    # A view that an operator returns cannot be changed in place, as Llama 4 does.
    return linear_3bit(x.reshape(-1, x.shape[-1]), planes, *scales, block, bias).view(*x.shape[:-1], len(planes))


@torch.library.custom_op("hf_cod::linear_3bit_backward", mutates_args=())
def linear_3bit_backward(
    grad: Tensor, planes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, block: int
) -> Tensor:
    """The gradient of x: grad (..., N) times W, which is (..., K)."""
    tokens = grad.reshape(-1, grad.shape[-1])
    # The contributions of all chunks are summed in float32.
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, block, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.block = block


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, *_, needs_bias = ctx.needs_input_grad
    to_x = linear_3bit_backward(grad, *ctx.saved_tensors, ctx.block) if needs_x else None
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
    return to_x, None, None, None, None, None, to_bias


linear_3bit.register_autograd(_backward, setup_context=_keep)
