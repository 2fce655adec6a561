"""The models of the tests once more, as plain functions of their weights: no module, no code of transformers or ours.

Symbols: B batch, T tokens, H hidden, h heads, g key and value heads, d head size. Weights come as a state dict.
"""

import math

import torch

Weights = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor | float, bias: torch.Tensor | float, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rotate(x: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Rotary embedding of x (B, h, T, d), first half of d against second half."""
    n_tokens, d = x.shape[-2:]
    angle = torch.arange(n_tokens)[:, None] / theta ** (torch.arange(0, d, 2) / d)  # (T, d / 2)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def causal_mask(n_tokens: int, window: int | None) -> torch.Tensor:
    row, column = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, h, T, d) for q and (B, g, T, d) for k and v -> (B, T, h d)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def self_attention(x: torch.Tensor, w: Weights, prefix: str, family: str, config: dict) -> torch.Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (linear(x, w, f"{prefix}.{name}_proj") for name in "qkv")
    if family == "olmo2":  # the norm is over all heads together
        q, k = (rms_norm(t, w[f"{prefix}.{n}_norm.weight"], config["rms_norm_eps"]) for n, t in (("q", q), ("k", k)))
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, heads), (k, groups), (v, groups)))
    if family == "qwen3":  # the norm is over each head
        q, k = (rms_norm(t, w[f"{prefix}.{n}_norm.weight"], config["rms_norm_eps"]) for n, t in (("q", q), ("k", k)))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    window = config.get("sliding_window") if family == "mistral" else None
    out = attend(rotate(q), rotate(k), v, causal_mask(x.shape[1], window))
    return linear(out, w, f"{prefix}.o_proj")


def gated_mlp(x: torch.Tensor, w: Weights, prefix: str) -> torch.Tensor:
    gate = linear(x, w, f"{prefix}.gate_proj")
    return linear(gate * torch.sigmoid(gate) * linear(x, w, f"{prefix}.up_proj"), w, f"{prefix}.down_proj")


def gpas(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x - SiLU(g) sg(x)."""
    return x - gate * torch.sigmoid(gate) * x.detach()


def placed_layer(placement, layer, n_layers, post_layers, x, norm, attention, mlp, alpha=None, gate=None, exponent=0.5):
    """One layer; `norm(name, x)` applies a norm by its Llama name; formulas as the papers write them, l = layer + 1.

    `alpha` replaces the residual gain of DeepNorm, `gate` is that of GPAS.
    """
    if gate is None:
        gate = torch.zeros(1)
    if placement == "mix":
        placement = "post" if layer < post_layers else "pre"
    if placement in ("pre", "scaled_init", "lns", "lns_output"):
        factor = (layer + 1) ** -exponent
        before, behind = factor if placement == "lns" else 1.0, factor if placement == "lns_output" else 1.0
        y = gpas(attention(norm("input_layernorm", x) * before) * behind + x, gate)
        return gpas(mlp(norm("post_attention_layernorm", y) * before) * behind + y, gate)
    if placement in ("post", "deepnorm"):
        if placement == "post":
            alpha = 1.0
        elif alpha is None:
            alpha = (2 * n_layers) ** (1 / 4)
        y = norm("post_attention_layernorm", alpha * gpas(x, gate) + attention(x))
        return norm("post_feedforward_layernorm", alpha * gpas(y, gate) + mlp(y))
    if placement == "sandwich":
        y = gpas(x + norm("post_attention_layernorm", attention(norm("input_layernorm", x))), gate)
        return gpas(y + norm("post_feedforward_layernorm", mlp(norm("pre_feedforward_layernorm", y))), gate)
    assert placement == "reordered"
    y = gpas(x + norm("post_attention_layernorm", attention(x)), gate)
    return gpas(y + norm("post_feedforward_layernorm", mlp(y)), gate)


def language_model(
    w: Weights, family: str, config: dict, tokens: torch.Tensor, post_layers: int, alpha: float | None = None
) -> torch.Tensor:
    """Logits (B, T, vocabulary) for tokens (B, T)."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if family == "olmo":
            return layer_norm(x, 1.0, 0.0, 1e-5)
        return rms_norm(x, w[f"{name}.weight"], config["rms_norm_eps"])

    x = w["model.embed_tokens.weight"][tokens]
    n_layers = config["num_hidden_layers"]
    for i in range(n_layers):
        prefix = f"model.layers.{i}"
        x = placed_layer(
            config["norm_placement"],
            i,
            n_layers,
            post_layers,
            x,
            lambda name, y, prefix=prefix: norm(f"{prefix}.{name}", y),
            lambda y, prefix=prefix: (
                self_attention(y, w, f"{prefix}.self_attn", family, config)
                * w.get(f"{prefix}.attention_scale.weight", 1.0)
            ),
            lambda y, prefix=prefix: gated_mlp(y, w, f"{prefix}.mlp") * w.get(f"{prefix}.mlp_scale.weight", 1.0),
            alpha,
            w.get(f"{prefix}.activation_scaling.gate"),
            config["lns_exponent"],
        )
    return norm("model.norm", x) @ w["lm_head.weight"].T


VIT_NORMS = {"input_layernorm": "layernorm_before", "post_attention_layernorm": "layernorm_after"}


def vision_model(w: Weights, config: dict, pixels: torch.Tensor, post_layers: int) -> torch.Tensor:
    """Logits (B, labels) for pixels (B, channels, height, width)."""
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attention(x: torch.Tensor, prefix: str) -> torch.Tensor:
        q, k, v = (linear(x, w, f"{prefix}.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        return linear(attend(q, k, v, None), w, f"{prefix}.o_proj")

    def mlp(x: torch.Tensor, prefix: str) -> torch.Tensor:
        y = linear(x, w, f"{prefix}.fc1")
        return linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), w, f"{prefix}.fc2")

    size = config["patch_size"]
    patches = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, patches, C size size)
    kernel = w["vit.embeddings.patch_embeddings.projection.weight"].flatten(1)
    x = patches @ kernel.T + w["vit.embeddings.patch_embeddings.projection.bias"]
    x = (
        torch.cat([w["vit.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
        + w["vit.embeddings.position_embeddings"]
    )
    n_layers = config["num_hidden_layers"]
    for i in range(n_layers):
        prefix = f"vit.layers.{i}"
        x = placed_layer(
            config["norm_placement"],
            i,
            n_layers,
            post_layers,
            x,
            lambda name, y, prefix=prefix: norm(f"{prefix}.{VIT_NORMS.get(name, name)}", y),
            lambda y, prefix=prefix: (
                attention(y, f"{prefix}.attention") * w.get(f"{prefix}.attention_scale.weight", 1.0)
            ),
            lambda y, prefix=prefix: mlp(y, f"{prefix}.mlp") * w.get(f"{prefix}.mlp_scale.weight", 1.0),
            gate=w.get(f"{prefix}.activation_scaling.gate"),
            exponent=config["lns_exponent"],
        )
    return linear(norm("vit.layernorm", x)[:, 0], w, "classifier")
