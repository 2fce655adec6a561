"""The forward pass of llama.cpp's architecture `deci`, on the tensors of a GGUF file: Llama with sizes by layer.

x <- x + W_o attention(rope(W_q n), rope(W_k n), W_v n), n = norm(x); x <- x + W_down (silu(W_gate n) * W_up n).
A layer without tensors of a part passes it over. Rotary positions turn adjacent pairs of a head's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


def deci_logits(
    tensors: Tensors, heads: Sequence[int], kv_heads: Sequence[int], base: float, epsilon: float, ids: Tensor
) -> Tensor:
    """Logits in float32, (T, vocabulary), of one sequence.

    Args:
        tensors: name in GGUF -> tensor.
        heads: number of query heads of each layer; 0 without attention.
        kv_heads: number of key and value heads of each layer.
        base: of the rotary frequencies.
        epsilon: of the norms.
        ids: (T,) tokens.
    """
    x = tensors["token_embd.weight"][ids].float()  # (T, D)
    for index, (h, g) in enumerate(zip(heads, kv_heads, strict=True)):
        layer = {
            name.removeprefix(f"blk.{index}."): t for name, t in tensors.items() if name.startswith(f"blk.{index}.")
        }
        if h:
            n = _norm(x, layer["attn_norm.weight"], epsilon)
            q, k, v = (_linear(n, layer, f"attn_{part}").view(len(x), heads_, -1) for part, heads_ in _parts(h, g))
            factors = tensors.get("rope_freqs.weight")
            q, k, v = (t.transpose(0, 1) for t in (_turned(q, base, factors), _turned(k, base, factors), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + _linear(mixed.transpose(0, 1).flatten(1), layer, "attn_output")
        if "ffn_norm.weight" in layer:
            n = _norm(x, layer["ffn_norm.weight"], epsilon)
            x = x + _linear(F.silu(_linear(n, layer, "ffn_gate")) * _linear(n, layer, "ffn_up"), layer, "ffn_down")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return _norm(x, tensors["output_norm.weight"], epsilon) @ head.float().T


def _parts(h: int, g: int) -> tuple[tuple[str, int], ...]:
    return ("q", h), ("k", g), ("v", g)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.float(), epsilon)


def _linear(x: Tensor, layer: Tensors, name: str) -> Tensor:
    bias = layer.get(f"{name}.bias")
    return F.linear(x, layer[f"{name}.weight"].float(), None if bias is None else bias.float())


def _turned(x: Tensor, base: float, factors: Tensor | None) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of x (T, heads, d) by position * base^(-2j / d) / factor_j."""
    d = x.shape[-1]
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    frequencies = frequencies if factors is None else frequencies / factors
    angles = torch.outer(torch.arange(len(x), dtype=torch.float32, device=x.device), frequencies)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).flatten(-2)
