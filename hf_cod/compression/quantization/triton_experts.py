"""x W^T on CUDA for the tokens of all experts of a bank, in one launch, directly from their codes.

A program multiplies a tile of the tokens of one expert by a tile of its rows. Codes are decoded tile by tile, in
registers. Which expert a tile belongs to is computed on the device, so the host does not wait for the router.

Symbols as in `format` and `triton_kernel`; a part is g = B / 4 consecutive columns of a run. The bytes of a row of four
bits, cut into four equal runs, are the B0..B3 to which planes of three bits expand: the kernel decodes both as NF4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_cod.compression.quantization.product import Scales
from hf_cod.compression.quantization.scales import NESTED_BLOCK
from hf_cod.compression.quantization.triton_kernel import codebook, scales_at

# Rows of W, and tokens, of a tile; the smaller number of tokens if experts have no more on average. Both are at least
# the least size of the matrix units, 16.
_ROWS, _TOKENS, _FEW_TOKENS = 64, 64, 16
# Columns of a step; a multiple of a part also at the largest block, 256.
_COLUMNS = 64


def grouped_product(
    tokens: Tensor,
    ends: Tensor,
    codes: Tensor,
    places: Tensor,
    scales: Scales,
    block: int,
    rows: int,
) -> Tensor:
    """tokens (T, K), sorted by expert, times W^T of the expert of each: (T, N), summed in float32.

    W is rounded to the tokens' dtype first, as in the other implementations. Tokens after the last end get zeros.

    Args:
        tokens: in float32, bfloat16 or float16.
        ends: (E,), the index after the last token of each expert.
        codes: (bytes,), of all experts.
        places: (2, E) int64: the first byte of each expert's codes, and its bits.
        scales: as `BlockScales` returns them, (E, ...).
        block: number of weights of a row that share a scale.
        rows: N.
    """
    from hf_cod.compression.quantization.bnb_decoding import dynamic_code

    (T, K), E = tokens.shape, len(ends)
    absmax, nested_absmax, offset = scales
    out = tokens.new_zeros(T, rows)
    size = _FEW_TOKENS if T <= _FEW_TOKENS * E else _TOKENS
    double = nested_absmax is not None
    starts, last_tiles, owners = _tiles(ends, T, size)
    _multiply_grouped[(len(owners), triton.cdiv(rows, _ROWS))](
        tokens.contiguous(),
        codes,
        places,
        absmax,
        nested_absmax if double else absmax,
        offset if double else absmax,
        dynamic_code(codes.device) if double else absmax,
        codebook(4, codes.device),
        starts,
        ends,
        last_tiles,
        owners,
        out,
        E,
        rows,
        K,
        BLOCK=block,
        NESTED=NESTED_BLOCK if double else 0,
        ROWS=_ROWS,
        TOKENS=size,
        PARTS=_COLUMNS // (block // 4),
        num_stages=1,  # more keep several steps in shared memory, which is 64 KiB on small GPUs
    )
    return out


def _tiles(ends: Tensor, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(The first token of each expert, the number of tiles up to and with each expert, the expert of each tile).

    There are as many tiles as there can be at most; those that are not needed belong to an expert after the last one.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    last_tiles = ((counts + size - 1) // size).cumsum(0)
    most = tokens // size + min(tokens, len(ends))
    owners = torch.searchsorted(last_tiles, torch.arange(most, device=ends.device), right=True)
    return ends - counts, last_tiles, owners


@triton.jit
def _multiply_grouped(
    x,  # (T, K)
    codes,
    places,  # (2, E)
    absmax,  # (E, N K / B)
    nested_absmax,
    offset,
    dynamic_code,  # (256,): values of the codes of scales
    codebook,  # (16,)
    starts,  # (E,)
    ends,  # (E,)
    last_tiles,  # (E,)
    owners,
    out,  # (T, N)
    E,
    N,
    K,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,  # scales that share a scale, or 0: scales are float32
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,  # parts of blocks in a step
):
    """Multiplies ROWS rows of one expert's W by TOKENS of its tokens, PARTS * B / 4 columns at a time."""
    WIDTH: tl.constexpr = BLOCK // 4  # columns of a part
    STEP: tl.constexpr = PARTS * WIDTH
    tile = tl.program_id(0)
    expert = tl.load(owners + tile)
    if expert >= E:
        return
    start, end = tl.load(starts + expert), tl.load(ends + expert)
    first_tile = tl.load(last_tiles + expert) - (end - start + TOKENS - 1) // TOKENS
    t = start + (tile - first_tile) * TOKENS + tl.arange(0, TOKENS)
    known_t = t < end
    token = t.to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    known_n = row < N
    run, parts = K // 8, K // BLOCK  # bytes of a run, parts of a run
    mine = codes + tl.load(places + expert)
    bits = tl.load(places + E + expert)
    absmax += expert.to(tl.int64) * N * parts
    if NESTED != 0:
        nested_absmax += expert.to(tl.int64) * ((N * parts + NESTED - 1) // NESTED)
        offset += expert
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for r in range(4):
        for first in range(0, parts, PARTS):
            i = first * WIDTH + tl.arange(0, STEP)  # columns of the run; each byte holds two
            inside = i < K // 4
            here = known_n[:, None] & inside[None, :]
            at = mine + row[:, None] * (bits * run) + (i // 2)[None, :]
            b = _run_bytes(at, here, r, run, bits)
            part = first + tl.arange(0, PARTS)
            which = row[:, None] * parts + ((r * parts + part) // 4)[None, :]
            known = known_n[:, None] & (part < parts)[None, :]
            s = scales_at(absmax, nested_absmax, offset, dynamic_code, which, known, NESTED)
            s = tl.reshape(tl.broadcast_to(s[:, :, None], (ROWS, PARTS, WIDTH)), (ROWS, STEP))
            code = (b >> (4 - 4 * (i % 2))[None, :]) & 15
            w = (tl.load(codebook + code) * s).to(x.dtype.element_ty)
            at_x = x + token[None, :] * K + (r * (K // 4) + i)[:, None]
            xs = tl.load(at_x, mask=inside[:, None] & known_t[None, :], other=0.0)
            sums = tl.dot(w, xs, sums, input_precision="ieee")
    target = out + token[None, :] * N + row[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), mask=known_n[:, None] & known_t[None, :])


@triton.jit
def _run_bytes(at, here, r, run, bits):
    """Bytes of run r, as four bits store them. In three bits, the lowest bits of nibbles hold the last run."""
    if bits == 4:
        b = tl.load(at + r * run, mask=here, other=0).to(tl.int32)
    elif r < 3:
        b = tl.load(at + r * run, mask=here, other=0).to(tl.int32) | 0x11
    else:
        b = (tl.load(at, mask=here, other=0).to(tl.int32) & 0x11) << 1
        b |= (tl.load(at + run, mask=here, other=0).to(tl.int32) & 0x11) << 2
        b |= (tl.load(at + 2 * run, mask=here, other=0).to(tl.int32) & 0x11) << 3 | 0x11
    return b
