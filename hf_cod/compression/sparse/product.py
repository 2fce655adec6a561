"""`torch.ops.hf_cod.sparse_linear`: x W^T + b with a packed W, as one operator for torch.compile and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from hf_cod.compression.sparse.format import unpack
from hf_cod.compression.sparse.kernel import load_kernel

# The kernel multiplies up to this number of tokens; for more, the matrix is made dense once for all of them.
MOST_TOKENS = 16
# Number of weights in each dense block: few enough to stay in the processor's cache.
_BLOCK = 1 << 20

# values -> (their version, the dense matrix); used without a kernel.
_dense_matrices = WeakTensorKeyDictionary()


def multiply(x: Tensor, mask: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, for a matrix W packed by `format.pack`; the operator `sparse_linear` without its overhead.

    Args:
        x: (..., columns), of the values' dtype.
        mask, values, row_starts: W (rows, columns).
        bias: (rows,), or None.

    Returns:
        (..., rows), summed in float32 and rounded once.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kernel = _kernel_for(values)
    if kernel is None:
        out = linear(tokens, _dense(mask, values, x.shape[-1]), bias)
    elif len(tokens) <= MOST_TOKENS and values.dtype in (torch.float32, torch.bfloat16):
        out = kernel.product(tokens, mask, values, row_starts, None if bias is None else bias.contiguous(), None)
    else:
        out = tokens.new_empty(len(tokens), len(mask))
        for rows, W in _blocks(kernel, mask, values, row_starts, x.shape[-1]):
            out[:, rows] = linear(tokens, W, None if bias is None else bias[rows])
    return out.view(*x.shape[:-1], len(mask))


sparse_linear = torch.library.custom_op("hf_cod::sparse_linear", multiply, mutates_args=())


@torch.library.custom_op("hf_cod::sparse_linear_backward", mutates_args=())
def sparse_linear_backward(grad: Tensor, mask: Tensor, values: Tensor, row_starts: Tensor, columns: int) -> Tensor:
    """The gradient of x: grad (..., rows) times W, which is (..., columns)."""
    tokens = grad.reshape(-1, grad.shape[-1])
    kernel = _kernel_for(values)
    if kernel is None:
        out = tokens @ _dense(mask, values, columns)
    else:
        # The contributions of all blocks are summed in float32.
        out = tokens.new_zeros(len(tokens), columns, dtype=torch.promote_types(grad.dtype, torch.float32))
        for rows, W in _blocks(kernel, mask, values, row_starts, columns):
            out += tokens[:, rows] @ W
    return out.to(grad.dtype).view(*grad.shape[:-1], columns)


def _kernel_for(values: Tensor) -> Any:
    return load_kernel() if values.device.type == "cpu" else None


def _blocks(
    kernel: Any, mask: Tensor, values: Tensor, row_starts: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice of rows, the dense rows), for all rows."""
    step = max(1, _BLOCK // max(1, columns))
    for first in range(0, len(mask), step):
        last = min(first + step, len(mask))
        yield slice(first, last), kernel.rows(mask, values, row_starts, columns, first, last)


def _dense(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix, cached while its values exist and do not change."""
    version = None if values.is_inference() else values._version
    kept = _dense_matrices.get(values)
    if kept is None or kept[0] != version:
        kept = version, unpack(mask, values, columns)
        _dense_matrices[values] = kept
    return kept[1]


@sparse_linear.register_fake
def _(x: Tensor, mask: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


@sparse_linear_backward.register_fake
def _(grad: Tensor, mask: Tensor, values: Tensor, row_starts: Tensor, columns: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, values, row_starts, _ = inputs
    ctx.save_for_backward(mask, values, row_starts)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, values, row_starts = ctx.saved_tensors
    needs_x, *_, needs_bias = ctx.needs_input_grad
    to_x = sparse_linear_backward(grad, mask, values, row_starts, ctx.columns) if needs_x else None
    to_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
    return to_x, None, None, None, to_bias


sparse_linear.register_autograd(_backward, setup_context=_keep)
