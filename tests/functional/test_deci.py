"""The forward pass of `deci` against Llama of transformers, and position by position against plain loops."""

import math

import torch

from hf_cod.functional.deci import deci_logits


def naive(tensors, heads, groups, base, epsilon, ids):
    """One token, head and pair at a time, in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    xs = [t["token_embd.weight"][i] for i in ids]

    def norm(x, w):
        return x / torch.sqrt((x * x).mean() + epsilon) * w

    def turn(x, place):
        out = x.clone()
        for j in range(len(x) // 2):
            angle = place * base ** (-2 * j / len(x)) / float(t["rope_freqs.weight"][j])
            a, b = float(x[2 * j]), float(x[2 * j + 1])
            out[2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    for i, (h, g) in enumerate(zip(heads, groups, strict=True)):
        if h:
            n = [norm(x, t[f"blk.{i}.attn_norm.weight"]) for x in xs]
            q, k, v = ([t[f"blk.{i}.attn_{p}.weight"] @ x for x in n] for p in "qkv")
            q[:] = [x + t.get(f"blk.{i}.attn_q.bias", 0) for x in q]
            d = len(q[0]) // h
            for place in range(len(xs)):
                parts = []
                for head in range(h):
                    own = slice(head // (h // g) * d, head // (h // g) * d + d)
                    query = turn(q[place][head * d : head * d + d], place)
                    w = torch.stack([query @ turn(k[p][own], p) / math.sqrt(d) for p in range(place + 1)]).softmax(0)
                    parts.append(sum(w[p] * v[p][own] for p in range(place + 1)))
                xs[place] = xs[place] + t[f"blk.{i}.attn_output.weight"] @ torch.cat(parts)
        for place, x in enumerate(xs):
            n = norm(x, t[f"blk.{i}.ffn_norm.weight"])
            gate, up = (t[f"blk.{i}.ffn_{part}.weight"] @ n for part in ("gate", "up"))
            xs[place] = x + t[f"blk.{i}.ffn_down.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([t["token_embd.weight"] @ norm(x, t["output_norm.weight"]) for x in xs])


def test_as_plain_loops():
    generator, d, size = torch.Generator().manual_seed(0), 8, 4
    heads, groups, channels = [4, 0, 2], [2, 0, 1], [6, 4, 10]

    def some(*shape):
        return torch.randn(shape, generator=generator) / 2

    tensors = {"token_embd.weight": some(11, d), "output_norm.weight": some(d), "rope_freqs.weight": 1 + some(2).abs()}
    for i, (h, g, c) in enumerate(zip(heads, groups, channels, strict=True)):
        shapes = {"ffn_gate": (c, d), "ffn_up": (c, d), "ffn_down": (d, c), "ffn_norm": (d,)}
        if h:
            shapes |= {"attn_q": (h * size, d), "attn_k": (g * size, d), "attn_v": (g * size, d)}
            shapes |= {"attn_output": (d, h * size), "attn_norm": (d,)}
            tensors[f"blk.{i}.attn_q.bias"] = some(h * size)
        tensors |= {f"blk.{i}.{name}.weight": some(*shape) for name, shape in shapes.items()}
    ids = torch.tensor([3, 1, 10, 3, 7])
    found = deci_logits(tensors, heads, groups, 100.0, 1e-5, ids)
    assert torch.allclose(found.double(), naive(tensors, heads, groups, 100.0, 1e-5, ids.tolist()), atol=1e-4)
