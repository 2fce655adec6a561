"""Rounding of a matrix to the uniform symmetric grid, and its packed tensors, as compressed-tensors names them.

The b-bit codes of a row, offset to 0..2^b - 1, follow one another without gaps, the lowest bit first, in int32 words.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_cod.functional import codebook
from hf_cod.functional.scale_fit import fitted_scales
from hf_cod.functional.sparsity import DAMPING

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
_WORD = 32
# How often scales and codes are improved by turns after GPTQ: each round costs as much as GPTQ.
ROUNDS = 3
# Weights whose bits are unpacked at a time.
CHUNK = 1 << 22


def round_uniform(
    W: Tensor, bits: int, group: int, name: str, squares: Tensor | None = None, products: Tensor | None = None
) -> dict[str, Tensor]:
    """Chooses scales, rounds them to the dtype of W, and rounds the weights with these scales.

    With nothing given, scales are the largest magnitude of each group, and codes the nearest ones. With squares, scales
    have the least error weighted by them; with products, rounding also compensates errors (GPTQ); scales are then
    fitted to the codes, and codes to the scales, `ROUNDS` times.

    Args:
        W: (out, in), any floating dtype; `in` is a multiple of the group.
        bits: 2 to 8.
        group: number of adjacent weights of a row that share a scale.
        name: of the matrix, for error messages.
        squares: sum over tokens of x_j^2, (in,).
        products: X^T X, (in, in).

    Returns:
        The packed codes (out, ceil(in b / 32)) int32, scales (out, in / group) in the dtype of W, and the shape (2,).

    Raises:
        ValueError: NaN or infinity in W.
    """
    high = W.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
    if not high.isfinite().all():
        raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")
    weights = products.diagonal() if products is not None else squares
    if weights is None or not weights.any():
        s = codebook.largest_scales(high, bits, group, uniform=True)
    else:
        s = codebook.search_scales(high, bits, group, weights.to(high.device), uniform=True)
    if products is None:
        scale, s = _stored(s, bits, W.dtype)
        c = codebook.nearest_codes(high, s, bits, group, uniform=True)
    else:
        scale, c = _compensated(high, s, products, bits, group, W.dtype)
    return {PACKED: pack(c, bits), SCALE: scale, SHAPE: torch.tensor(W.shape)}


def _stored(s: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as stored, and s as it follows from them."""
    half = 1 << (bits - 1)
    scale = (s / half).to(dtype)
    return scale, scale.to(s.dtype) * half


def _compensated(W: Tensor, s: Tensor, H: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as stored, and codes: those of GPTQ, then by turns scales for the codes and codes for the scales."""
    c = codebook.compensated_codes(W, _stored(s, bits, dtype)[1], H, bits, group, uniform=True)
    for _ in range(ROUNDS):
        s = fitted_scales(W, codebook.codebook(bits, W, uniform=True)[c.long()], H, group, DAMPING)
        c = codebook.descended_codes(W, c, _stored(s, bits, dtype)[1], H, bits, group, uniform=True)
    return _stored(s, bits, dtype)[0], c


def decode(tensors: dict[str, Tensor], bits: int, group: int) -> Tensor:
    """Q (out, in) in the dtype of the scales: the product of integer and scale, rounded once, as engines compute it."""
    scale = tensors[SCALE]
    rows, columns = tensors[SHAPE].tolist()
    q = unpack(tensors[PACKED], bits, columns).to(scale.device, scale.dtype) - (1 << (bits - 1))
    return (q.view(rows, -1, group) * scale[..., None]).view(rows, columns)


def pack(c: Tensor, bits: int) -> Tensor:
    """(N, ceil(K b / 32)) int32 of codes (N, K) uint8."""
    parts = [_pack(rows, bits) for rows in c.split(max(1, CHUNK // c.shape[1]))]
    return torch.cat(parts).to(c.device)


def _pack(c: Tensor, bits: int) -> Tensor:
    codes = c.cpu().numpy()
    spread = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # (N, K, b), lowest bit first
    packed = np.packbits(spread.reshape(len(codes), -1), axis=1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % (_WORD // 8))))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (N, K) uint8 of the words of `pack`."""
    parts = [_unpack(rows, bits, columns) for rows in packed.split(max(1, CHUNK // columns))]
    return torch.cat(parts).to(packed.device)


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    raw = packed.cpu().contiguous().numpy().astype("<i4").view(np.uint8)
    spread = np.unpackbits(raw, axis=1, count=columns * bits, bitorder="little").reshape(len(raw), columns, bits)
    codes = (spread << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return torch.from_numpy(codes)
