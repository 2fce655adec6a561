"""Quantization to few bits: codebooks, block scales, and rounding with error compensation (GPTQ).

The codebook is NormalFloat's in three and four bits, this package's format, or with `uniform` the values of a symmetric
uniform grid in two to eight bits, that of other engines: C = q / h with q = -h .. h - 1 and h = 2^(bits - 1), so that
Q = q s / h.

Symbols: W a weight matrix (N, K), N outputs, K inputs; C a codebook, rising, 2^bits values in [-1, 1]; c codes (N, K)
uint8, indices into C; B the block size: B neighbours in a row share a scale, K is a multiple of B; s scales (N, K / B);
w the cost of an error in each input channel, (K,), or None for equal costs; H = X^T X (K, K); U upper triangular,
H^-1 = U^T U.
The rounded matrix is Q_ij = s_i,j/B C[c_ij].
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_diagonal
from hf_cod.functional.sparsity import DAMPING, inverse_factor

# QLoRA's NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of a normal distribution.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# The 3-bit codebook is every second value of NF4, so that a 3-bit code c is the 4-bit code 2 c + 1, and any NF4 decoder
# decodes it. The values are not symmetric, so the scale of a block has a sign.
CODEBOOKS = {3: NF4[1::2], 4: NF4}
# Shares of a block's largest magnitude that are tried as its scale. 1.0 comes first, so that it is chosen where
# channels are always zero and all shares cost nothing.
TRIED = {3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
# A uniform grid ends before 1, so that shares above 1 are tried, too. Its few bits need more clipping.
TRIED_UNIFORM = (1.0, *(share / 20 for share in range(26, 7, -1) if share != 20))
UNIFORM_BITS = (2, 3, 4, 5, 6, 7, 8)
# Weights that are rounded or whose scales are searched at a time, and columns whose errors are propagated at a time.
CHUNK, COLUMNS = 1 << 18, 64
# Cells in each half of [-1, 1]; midpoints of NF4 are at least 0.08 apart.
_CELLS = 64


def codebook(bits: int, like: Tensor, uniform: bool = False) -> Tensor:
    """C (2^bits,) in the precision and on the device of `like`."""
    if uniform:
        half = 1 << (bits - 1)
        return torch.arange(-half, half, dtype=like.dtype, device=like.device) / half
    return torch.tensor(CODEBOOKS[bits], dtype=like.dtype, device=like.device)


def largest_scales(W: Tensor, bits: int, block: int, uniform: bool = False) -> Tensor:
    """s (N, K / B): the largest magnitude of each block; for three bits with the sign of that weight, for a uniform
    grid with the other one, because it has -1 and not 1.
    """
    blocks = _blocks(W, block)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    if uniform:
        return -extreme
    return extreme if bits == 3 else extreme.abs()


def search_scales(W: Tensor, bits: int, block: int, w: Tensor, uniform: bool = False) -> Tensor:
    """s (N, K / B): the scale of least cost among shares of the largest one (`TRIED`), for three bits and for a uniform
    grid with both signs.

        sum_j w_j (W_ij - s C[c_ij])^2,   c_ij the nearest code

    With w_j = ||X_j||_2^2 this is the error of the output if channels are uncorrelated. With w_j = 1 the search gives a
    worse language model than no search: clipping the few large weights of a block lowers the squared error of the
    weights, but raises the loss.
    """
    return torch.cat([_search(rows, bits, block, w, uniform) for rows in W.split(max(1, CHUNK // W.shape[1]))])


def nearest_codes(W: Tensor, s: Tensor, bits: int, block: int, uniform: bool = False) -> Tensor:
    """c (N, K): the code of the value nearest to each weight; a block with scale 0 holds only zeros."""
    rows = max(1, CHUNK // W.shape[1])
    parts = zip(W.split(rows), _safe(s).split(rows), strict=True)
    found = [_nearest(_blocks(part, block) / scale[..., None], bits, uniform).to(torch.uint8) for part, scale in parts]
    return torch.cat(found).view(W.shape)


def decode(c: Tensor, s: Tensor, bits: int, block: int, uniform: bool = False) -> Tensor:
    """Q (N, K), in the precision of s."""
    return (codebook(bits, s, uniform)[_blocks(c, block).long()] * s[..., None]).view(c.shape)


def rounded(W: Tensor, bits: int, w: Tensor | None = None, block: int = 64) -> Tensor:
    """W (N, K) rounded to the nearest codes, in its own dtype; scales are searched if w (K,) is given.

    A row whose length is no multiple of the block is padded with zeros.
    """
    missing = -W.shape[1] % block
    high = torch.nn.functional.pad(W.to(torch.promote_types(W.dtype, torch.float32)), (0, missing))
    if w is None:
        s = largest_scales(high, bits, block)
    else:
        s = search_scales(high, bits, block, torch.nn.functional.pad(w, (0, missing)))
    return decode(nearest_codes(high, s, bits, block), s, bits, block)[:, : W.shape[1]].to(W.dtype)


def compensated_codes(
    W: Tensor, s: Tensor, H: Tensor, bits: int, block: int, damping: float = DAMPING, uniform: bool = False
) -> Tensor:
    """c (N, K) by GPTQ: columns are rounded one after the other, each error compensated by the columns not yet rounded.

        e = (W_j - Q_j) / U_jj,   W_k <- W_k - e U_jk   for k after j

    GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1) on this codebook. Columns are rounded in falling order of
    H_jj, so that the most important ones are rounded while most others can still compensate. Scales are fixed before:
    codes keep their stored positions, and rounding uses the scales as stored.

    Args:
        W: (N, K).
        s: (N, K / B).
        H: (K, K); not modified.
        bits, block: 3 or 4 (2 to 8 if uniform); B.
        damping: share of the mean of H's diagonal that is added to it.
        uniform: round to the uniform grid.

    Returns:
        (N, K) uint8.

    Raises:
        ValueError: H is not positive definite, whatever the damping.
    """
    C = codebook(bits, W, uniform)
    order = H.diagonal().argsort(descending=True, stable=True)
    U = inverse_factor(H[order][:, order].to(W), damping)
    V = W.mT[order]  # (K, N): columns as rows, a copy
    scales, block_of = _safe(s).mT, (order // block).tolist()
    codes = torch.empty_like(V, dtype=torch.uint8)
    for start in range(0, len(V), COLUMNS):
        here = slice(start, start + COLUMNS)
        errors = torch.empty_like(V[here])
        for i in range(start, min(start + COLUMNS, len(V))):
            scale = scales[block_of[i]]
            found = _nearest(V[i] / scale, bits, uniform)
            codes[i] = found.to(torch.uint8)
            errors[i - start] = (V[i] - C[found] * scale) / U[i, i]
            V[i + 1 : start + COLUMNS].addr_(U[i, i + 1 : start + COLUMNS], errors[i - start], alpha=-1)
        V[start + COLUMNS :].addmm_(U[here, start + COLUMNS :].mT, errors, alpha=-1)
    return codes[order.argsort()].mT.contiguous()


def descended_codes(
    W: Tensor, c: Tensor, s: Tensor, H: Tensor, bits: int, block: int, damping: float = DAMPING, uniform: bool = False
) -> Tensor:
    """c (N, K) after one pass of coordinate descent, which lowers the error of the outputs, or leaves it as it is.

        Q_j <- the value nearest to Q_j + P_j / H'_jj,   P = (W - Q) H',   H' = H + damping mean(diag H) I

    Each column is rounded again with all others fixed (QuantEase, Behdin et al. 2023, arXiv 2309.01885), while GPTQ
    rounds it before it knows the errors of those after it.

    Args:
        W, s, H, bits, block, damping, uniform: as in `compensated_codes`.
        c: (N, K) uint8; not modified.
    """
    C = codebook(bits, W, uniform)
    H = H.to(W) + damped_diagonal(H.to(W), damping)
    scale = s.mT.repeat_interleave(block, 0)  # (K, N)
    safe = _safe(scale)
    codes = c.mT.contiguous()
    Q = C[codes.long()] * scale  # (K, N): columns as rows
    P = H @ (W.mT - Q)
    for start in range(0, len(Q), COLUMNS):
        here = slice(start, min(start + COLUMNS, len(Q)))
        changes = torch.empty_like(Q[here])
        for i in range(here.start, here.stop):
            found = _nearest((Q[i] + P[i] / H[i, i]) / safe[i], bits, uniform)
            codes[i] = found.to(torch.uint8)
            changes[i - start] = C[found] * scale[i] - Q[i]
            P[here].addr_(H[here, i], changes[i - start], alpha=-1)
        P[here.stop :].addmm_(H[here.stop :, here], changes, alpha=-1)
    return codes.mT.contiguous()


def _search(W: Tensor, bits: int, block: int, w: Tensor, uniform: bool) -> Tensor:
    blocks, C = _blocks(W, block), codebook(bits, W, uniform)
    weights = w.to(W).view(-1, block)  # (K / B, B)
    best = largest_scales(W, bits, block, uniform)
    least = torch.full_like(best, torch.inf)
    whole = best
    for share in TRIED_UNIFORM if uniform else TRIED[bits]:
        for sign in (1, -1) if uniform or bits == 3 else (1,):
            s = whole * (share * sign)
            Q = C[_nearest(blocks / _safe(s)[..., None], bits, uniform)] * s[..., None]
            cost = (blocks - Q).square().mul_(weights).sum(-1)
            better = cost < least
            best, least = torch.where(better, s, best), torch.where(better, cost, least)
    return best


def _nearest(x: Tensor, bits: int, uniform: bool) -> Tensor:
    """Indices (int32) of the values of C nearest to x; of two equally near ones the lower, on a uniform grid the even.

    [-1, 1] is divided into cells that hold at most one midpoint of C each, so one comparison with that midpoint gives
    the index. This takes a fifth of the time of the binary search of `torch.bucketize`.
    """
    if uniform:
        half = 1 << (bits - 1)
        return (x * half).round_().clamp_(-half, half - 1).add_(half).int()
    below, bound = _cells(bits, x.dtype, x.device)
    cell = x.clamp(-1, 1).mul_(_CELLS).add_(_CELLS).int().flatten()
    return below.index_select(0, cell).view(x.shape) + (x > bound.index_select(0, cell).view(x.shape)).int()


@cache
def _cells(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell the number of midpoints before it, and the next midpoint."""
    C = torch.tensor(CODEBOOKS[bits], dtype=dtype)
    middle = (C[1:] + C[:-1]) / 2
    starts = torch.arange(2 * _CELLS + 1, dtype=dtype) / _CELLS - 1
    below = torch.searchsorted(middle, starts, out_int32=True)
    return below.to(device), torch.cat([middle, middle.new_full((1,), torch.inf)])[below].to(device)


def _blocks(W: Tensor, block: int) -> Tensor:
    return W.reshape(len(W), -1, block)


def _safe(s: Tensor) -> Tensor:
    """Scales to divide by: 1 for a block of zeros, where any value works."""
    return torch.where(s == 0, 1, s)
