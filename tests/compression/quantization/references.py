"""Codebooks, scales and compensation as one would write them down: one weight at a time."""

from __future__ import annotations

import torch

from hf_cod.functional.codebook import CODEBOOKS, TRIED


def nearest(x, bits):
    """The index of the nearest value, the lower one of two as near."""
    C = CODEBOOKS[bits]
    return min(range(len(C)), key=lambda i: (abs(C[i] - x), i))


def block_of(W, block):
    """(row, block's number, its values) of each block."""
    for i, row in enumerate(W.tolist()):
        for b in range(len(row) // block):
            yield i, b, row[b * block : (b + 1) * block]


def largest_scales(W, bits, block):
    s = torch.zeros(len(W), W.shape[1] // block, dtype=W.dtype)
    for i, b, values in block_of(W, block):
        extreme = max(values, key=abs)
        s[i, b] = extreme if bits == 3 else abs(extreme)
    return s


def cost(values, s, bits, w):
    C = CODEBOOKS[bits]
    return sum(wj * (x - s * C[nearest(x / s, bits) if s else 0]) ** 2 for x, wj in zip(values, w, strict=True))


def least_cost(values, bits, w):
    """Of all scales that are tried, the least cost."""
    extreme = max(abs(x) for x in values)
    signs = (1, -1) if bits == 3 else (1,)
    return min(cost(values, sign * share * extreme, bits, w) for share in TRIED[bits] for sign in signs)


def compensated(W, s, H, bits, block, damping):
    """Q (N, K) of the optimal brain quantizer: for each column the whole inverse of what is left of H, anew, and the
    error made up for by all columns that are left (Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3).
    """
    C = torch.tensor(CODEBOOKS[bits], dtype=W.dtype)
    order = sorted(range(len(H)), key=lambda j: (-float(H[j, j]), j))
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    W, Q = W.clone(), torch.zeros_like(W)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(H[left][:, left])
        for i in range(len(W)):
            scale = s[i, j // block]
            Q[i, j] = C[nearest(float(W[i, j] / scale), bits)] * scale
            W[i, left] -= (W[i, j] - Q[i, j]) / inverse[0, 0] * inverse[0]
    return Q
