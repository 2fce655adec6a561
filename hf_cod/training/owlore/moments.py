"""AdamW for one parameter, in full rank or in the low-rank space of its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.low_rank import change_basis, gradient_basis, is_tall, lift, project
from hf_cod.functional.rounding import round_stochastically
from hf_cod.training.owlore import eight_bit

# Elements of a weight that are updated at a time; bounds the memory of an update.
CHUNK = 1 << 22


def is_projected(parameter: Tensor, rank: int | None) -> bool:
    """Whether a parameter is a matrix (or a bank of matrices) whose smaller dimension exceeds `rank`."""
    return rank is not None and parameter.ndim >= 2 and min(parameter.shape[-2:]) > rank


def refresh_basis(state: dict[str, Tensor], grad: Tensor, rank: int, draw: int, generator: torch.Generator) -> None:
    """Computes the basis of this gradient's leading directions once per sampling round; existing moments are kept.

    If the layer also trained in the previous round, its moments are kept without a change, as in GaLore (arXiv
    2403.03507, algorithm 2). If it was not sampled for a while, its moments are rotated into the new basis. A gradient
    of 0 (such as that of an expert without tokens) determines no basis: the matrix keeps its previous basis, or has
    none, until its gradient is not 0.

    `state["draw"]` is the number of the sampling round of each basis: shape () for a matrix, (experts,) for a bank.
    """
    last = state.get("draw", torch.full(grad.shape[:-2], -2))  # never
    if not bool((last != draw).any()):
        return
    fresh = (last != draw) & (torch.linalg.vector_norm(grad, float("inf"), dim=(-2, -1)) > 0).cpu()
    state["draw"] = torch.where(fresh, draw, last)
    whole = bool(fresh.all())
    if not whole and "basis" not in state:
        state["basis"] = grad.new_zeros((*grad.shape[:-2], min(grad.shape[-2:]), rank), dtype=_moment_dtype(grad))
    if not bool(fresh.any()):
        return
    at: Any = ... if whole else fresh
    basis, stay = gradient_basis(grad[at], rank, generator), last[at] == draw - 1
    if "exp_avg" in state and not bool(stay.all()):
        mean, square = _moments(state)
        turned = change_basis(mean[at], square[at], state["basis"][at], basis, is_tall(grad))
        for old, new in zip((mean, square), turned, strict=True):
            old[at] = torch.where(stay[..., None, None].to(new.device), old[at], new)
        _keep(state, mean, square)
    if whole:
        state["basis"] = basis
    else:
        state["basis"][at] = basis


def adam_direction(
    state: dict[str, Tensor], grad: Tensor, betas: tuple[float, float], eps: float, eight_bits: bool = False
) -> Tensor:
    """Adam's update direction, without learning rate and weight decay; moments are float32 for every gradient dtype.

        N = m^ / (sqrt(v^) + eps),  for R = project(G) if there is a basis, else for G

    With `eight_bits`, moments of at least `eight_bit.LEAST` elements are stored as 8-bit codes between steps: the mean,
    and the square root of the second moment, which spans half as many orders of magnitude.

    Returns:
        N, in R's shape if there is a basis, else in G's.
    """
    R = project(grad, state["basis"]) if "basis" in state else grad.to(_moment_dtype(grad))
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float64)
        if eight_bits and R.numel() >= eight_bit.LEAST:
            state["exp_avg_scale"] = state["exp_avg_sq_scale"] = torch.zeros(())  # marks the moments as coded
        _keep(state, torch.zeros_like(R), torch.zeros_like(R))
    state["step"] += 1
    step, (beta1, beta2) = state["step"].item(), betas
    mean, square = _moments(state)
    R = R.to(mean.dtype)  # decoded moments are float32
    mean.lerp_(R, 1 - beta1)
    square.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    _keep(state, mean, square)
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return mean.div(1 - beta1**step).div_(root)


@torch.no_grad()
def apply_direction(
    parameter: Tensor, N: Tensor, basis: Tensor | None, group: dict[str, Any], generator: torch.Generator | None
) -> None:
    """W <- (1 - lr decay) W - lr scale lift(N), computed a few rows at a time in N's precision.

    Args:
        parameter: W.
        N: result of `adam_direction`.
        basis: basis of a projected parameter, or None; `scale` is applied to projected parameters only.
        group: lr, weight_decay, scale.
        generator: for stochastic rounding of bfloat16 weights; None rounds to nearest.
    """
    factor = group["lr"] * (1.0 if basis is None else group["scale"])
    for rows, delta in _rows(parameter, N, basis):
        part = parameter[rows]
        updated = part.to(delta.dtype).mul(1 - group["lr"] * group["weight_decay"]).sub_(delta, alpha=factor)
        if part.dtype == torch.bfloat16 and generator is not None:
            updated = round_stochastically(updated, generator)
        part.copy_(updated)


def _rows(parameter: Tensor, N: Tensor, basis: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
    """Yields (rows, the lifted direction of these rows) over the full parameter."""
    if parameter.ndim == 0:
        yield ..., N
        return
    count = max(1, CHUNK // max(1, parameter[:1].numel()))
    tall = parameter.ndim > 1 and is_tall(parameter)
    for start in range(0, len(parameter), count):
        rows = slice(start, start + count)
        if basis is None:
            yield rows, N[rows]
        elif parameter.ndim > 2:  # rows are experts
            yield rows, lift(N[rows], basis[rows], tall)
        else:
            yield rows, lift(N[rows], basis, True) if tall else lift(N, basis[rows], False)


def _moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and second moment: the state's own tensors, or decoded copies of 8-bit ones."""
    if "exp_avg_scale" not in state:
        return state["exp_avg"], state["exp_avg_sq"]
    mean = eight_bit.decode(state["exp_avg"], state["exp_avg_scale"], signed=True)
    return mean, eight_bit.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False).square_()


def _keep(state: dict[str, Tensor], mean: Tensor, square: Tensor) -> None:
    """Stores both moments in the state, in 8 bits if they are coded."""
    if "exp_avg_scale" not in state:
        state["exp_avg"], state["exp_avg_sq"] = mean, square
        return
    state["exp_avg"], state["exp_avg_scale"] = eight_bit.encode(mean, signed=True)
    state["exp_avg_sq"], state["exp_avg_sq_scale"] = eight_bit.encode(square.sqrt(), signed=False)


def _moment_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)
