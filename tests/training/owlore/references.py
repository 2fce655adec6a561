"""The optimizers as their papers define them: one tensor at a time, the SVD whole."""

import torch


def adamw(w, g, state, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """One step of AdamW in place."""
    state.setdefault("t", 0)
    state["t"] += 1
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    m, v = state["m"] / (1 - betas[0] ** state["t"]), state["v"] / (1 - betas[1] ** state["t"])
    return w * (1 - lr * decay) - lr * m / (v.sqrt() + eps)


def galore(w, g, state, lr, r, refresh, scale, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """One step of GaLore (algorithm 2) with a basis of a full SVD."""
    tall = g.shape[0] >= g.shape[1]
    if refresh:
        U, _, Vh = torch.linalg.svd(g, full_matrices=False)
        state["P"] = Vh[:r].T if tall else U[:, :r]
    R = g @ state["P"] if tall else state["P"].T @ g
    N = -adamw(torch.zeros_like(R), R, state, 1.0, betas, eps)
    return w * (1 - lr * decay) - lr * scale * (N @ state["P"].T if tall else state["P"] @ N)
