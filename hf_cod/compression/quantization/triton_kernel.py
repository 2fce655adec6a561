"""x W^T on CUDA for few tokens, directly from the planes: memory reads of W are three bits a weight and the scales.

Symbols as in `format` and `product`; a part is g = B / 4 consecutive columns of a run, which always share a scale: the
length of a run, K / 4 columns, need not be a multiple of a block, but is a multiple of a part.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_cod.compression.quantization.scales import NESTED_BLOCK
from hf_cod.functional.codebook import CODEBOOKS

# Bytes of each plane per step; a multiple of a part also at the largest block, 256.
_STEP = 64


def product(
    tokens: Tensor,
    planes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """tokens (T, K), T from 1 to 16, times W^T plus the bias (N,): (T, N), summed in float32.

    W is rounded to the tokens' dtype first, as in the other implementations. For the other arguments see
    `product.decoded_rows`.
    """
    from hf_cod.compression.quantization.bnb_decoding import dynamic_code

    (T, K), N = tokens.shape, len(planes)
    tokens, planes = tokens.contiguous(), planes.contiguous()
    out = tokens.new_empty(T, N)
    double = nested_absmax is not None
    # TF32 represents both half-precision dtypes exactly, so products are exact; AMD GPUs lack it, and do without.
    halves = tokens.dtype != torch.float32 and torch.version.hip is None
    # One token is summed row by row; more use the matrix units, whose least size is 16.
    rows, lanes = (8, 1) if T == 1 else (16, 16)
    _multiply[(triton.cdiv(N, rows),)](
        tokens,
        planes,
        absmax,
        nested_absmax if double else absmax,
        offset if double else absmax,
        dynamic_code(planes.device) if double else absmax,
        codebook(3, planes.device),
        out if bias is None else bias,
        out,
        T,
        N,
        K,
        BLOCK=block,
        NESTED=NESTED_BLOCK if double else 0,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        TOKENS=lanes,
        PARTS=_STEP // (block // 8),
        PRECISION="tf32" if halves else "ieee",
    )
    return out


@cache
def codebook(bits: int, device: torch.device) -> Tensor:
    """(2^bits,): the values of the codes."""
    return torch.tensor(CODEBOOKS[bits], device=device)


@triton.jit
def _multiply(
    x,  # (T, K)
    planes,  # (N, 3 K / 8)
    absmax,  # (N K / B,)
    nested_absmax,
    offset,
    dynamic_code,  # (256,): values of the codes of scales
    codebook,  # (8,)
    bias,  # (N,)
    out,  # (T, N)
    T,
    N,
    K,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,  # scales that share a scale, or 0: scales are float32
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,  # parts of blocks in a step
    PRECISION: tl.constexpr,
):
    """Multiplies ROWS rows of W by all tokens, PARTS * B / 8 bytes of each plane at a time."""
    WIDTH: tl.constexpr = BLOCK // 8  # bytes of a part
    STEP: tl.constexpr = PARTS * WIDTH
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_inside = n < N
    row = n.to(tl.int64)
    t = tl.arange(0, TOKENS)
    run, parts = K // 8, K // BLOCK  # bytes of a plane, parts of a run
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, parts, PARTS):
        i = first * WIDTH + tl.arange(0, STEP)
        here = n_inside[:, None] & (i < run)[None, :]
        at = planes + row[:, None] * (3 * run) + i[None, :]
        p0 = tl.load(at, mask=here, other=0).to(tl.int32)
        p1 = tl.load(at + run, mask=here, other=0).to(tl.int32)
        p2 = tl.load(at + 2 * run, mask=here, other=0).to(tl.int32)
        p3 = (p0 & 0x11) << 1 | (p1 & 0x11) << 2 | (p2 & 0x11) << 3
        part = first + tl.arange(0, PARTS)
        for r in tl.static_range(4):
            b = p0 if r == 0 else (p1 if r == 1 else (p2 if r == 2 else p3))
            which = row[:, None] * parts + ((r * parts + part) // 4)[None, :]
            known = n_inside[:, None] & (part < parts)[None, :]
            s = scales_at(absmax, nested_absmax, offset, dynamic_code, which, known, NESTED)
            s = tl.reshape(tl.broadcast_to(s[:, :, None], (ROWS, PARTS, WIDTH)), (ROWS, STEP))
            for low in tl.static_range(2):
                code = (b >> (1 if low else 5)) & 7
                w = (tl.load(codebook + code) * s).to(x.dtype.element_ty).to(tl.float32)
                k = r * (K // 4) + 2 * i + low
                inside = (i < run)[:, None] & (t < T)[None, :]
                xs = tl.load(x + t[None, :].to(tl.int64) * K + k[:, None], mask=inside, other=0.0).to(tl.float32)
                if TOKENS == 1:
                    sums += tl.sum(w * tl.reshape(xs, (1, STEP)), 1)[:, None]
                else:
                    sums = tl.dot(w, xs, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    target = out + t[None, :].to(tl.int64) * N + row[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), mask=n_inside[:, None] & (t < T)[None, :])


@triton.jit
def scales_at(absmax, nested_absmax, offset, dynamic_code, which, known, NESTED: tl.constexpr):
    """The scales at indices `which`; 0 where not `known`."""
    if NESTED == 0:
        s = tl.load(absmax + which, mask=known, other=0.0)
    else:
        code = tl.load(absmax + which, mask=known, other=0).to(tl.int32)
        s = tl.load(dynamic_code + code) * tl.load(nested_absmax + which // NESTED, mask=known, other=0.0)
        s = tl.where(known, s + tl.load(offset), 0.0)
    return s
