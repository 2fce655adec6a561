"""Distillation losses: divergence of the logits, error of the hidden states.

Symbols: z, t logits (..., V) of student and teacher at the same positions, V the vocabulary; T the temperature;
q = softmax(z / T), p = softmax(t / T); K the positions that count, M those with a label; x, y hidden states (..., d).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_cod.functional.mixture import check_mixture

IGNORED = -100  # torch's mark for positions without a label
# Logits that are processed at a time: on a CPU their exponentials fit in the cache; on other devices few calls matter
# more.
CHUNK, CHUNK_OF_DEVICE = 2**21, 2**26


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    keep: Tensor | None = None,
    labels: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """Divergence of the student's predictions from the teacher's, mixed with the cross entropy of the labels.

        (1 - share) T^2 / |K| sum_{i in K} KL(p_i || q_i)  -  share / |M| sum_{i in M} log softmax(z_i)[label_i]

    Hinton et al. 2015 (arXiv 1503.02531, section 2); T^2 makes the size of the gradient independent of T. Minitron
    (Muralidharan et al. 2024, arXiv 2407.14679, section 3) heals pruned models with it, with T = 1 and no labels.

    The gradient, (1 - share) T (q - p) / |K| + share (softmax(z) - onehot) / |M|, is computed together with the loss, a
    few positions at a time. In addition to the logits of both models this needs one tensor of their size, in the
    student's dtype. Everything is computed in float32 or wider. Only the student gets gradients, and only once.

    Args:
        student: z.
        teacher: t, of any float dtype.
        temperature: T > 0.
        keep: (...) bool, True in K; None: all positions.
        labels: (...) target token of each position, `IGNORED` where there is none; required for a share above 0.
        share: share of the cross entropy, 0..1.

    Returns:
        A scalar in nats per position, float32 or wider. A term without positions is 0.

    Raises:
        ValueError: logits of two shapes, a temperature or a share out of range, no labels for a share above 0.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: expected logits of {tuple(student.shape)}, got {tuple(teacher.shape)}")
    check_mixture(temperature, share)
    if share and labels is None:
        raise ValueError(f"labels: expected some for a share of {share}, got none")
    positions = student.shape[:-1]
    keep = torch.ones(positions, dtype=torch.bool, device=student.device) if keep is None else keep
    labels = keep.new_full(positions, IGNORED, dtype=torch.long) if labels is None else labels
    loss: Tensor = _LogitLoss.apply(  # type: ignore[no-untyped-call]
        student.flatten(0, -2), teacher.detach().flatten(0, -2), temperature, keep.flatten(), labels.flatten(), share
    )
    return loss


def hidden_loss(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Squared error of hidden states, relative to the teacher's squared norm at each position.

        1 / |K| sum_{i in K} ||x_i - y_i||^2 / ||y_i||^2

    Minitron (arXiv 2407.14679, section 3) uses the mean squared error. Here it is divided by the teacher's squared
    norm, so that no layer and no token (the first one has massive activations) dominates.

    Args:
        student: x.
        teacher: y.
        keep: (...) bool, True in K; None: all positions.

    Returns:
        A scalar, float32 or wider; 0 without positions.

    Raises:
        ValueError: hidden states of two shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: expected hidden states of {tuple(student.shape)}, got {tuple(teacher.shape)}")
    high = torch.promote_types(student.dtype, torch.float32)
    x, y = student.to(high), teacher.detach().to(high)
    squares = y.square().sum(-1).clamp(min=torch.finfo(high).tiny)
    errors = (x - y).square().sum(-1) / squares
    if keep is None:
        return errors.mean()
    return errors.masked_fill(~keep, 0).sum() / keep.sum().clamp(min=1)


class _LogitLoss(torch.autograd.Function):
    """The loss of flat logits (N, V), and its gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, T: float, keep: Tensor, labels: Tensor, share: float) -> Tensor:
        high = torch.promote_types(z.dtype, torch.float32)
        # A quotient with an integer tensor would be float32.
        kept = keep.to(high) * ((1 - share) / keep.sum(dtype=high).clamp(min=1))
        labelled = (labels != IGNORED).to(high) * (share / (labels != IGNORED).sum(dtype=high).clamp(min=1))
        gradient = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=high, device=z.device)
        step = max(1, (CHUNK if z.device.type == "cpu" else CHUNK_OF_DEVICE) // z.shape[-1])
        for start in range(0, len(z), step):
            rows = slice(start, start + step)
            weights = kept[rows], labelled[rows]
            part, slope = _rows(z[rows].to(high), t[rows].to(high), T, labels[rows].clamp(min=0), *weights, share)
            loss += part
            if gradient is not None:
                gradient[rows] = slope
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None, None, None, None


def _rows(
    z: Tensor, t: Tensor, T: float, labels: Tensor, kept: Tensor, labelled: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Loss of a few rows (n, V), weighted by `kept` and `labelled` (n,), and its gradient (n, V)."""
    log_q = (z / T).log_softmax(-1)
    log_p = (t / T).log_softmax(-1)
    p = log_p.exp()
    divergence = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)  # the teacher's logits may be -inf
    # A row that does not count may hold any values, also NaN.
    loss = torch.where(kept > 0, divergence, 0) @ kept * T**2
    slope = torch.where(kept[:, None] > 0, log_q.exp().sub_(p), 0).mul_(kept[:, None] * T)
    if share:
        log_q = z.log_softmax(-1)
        wanted = labels[:, None]
        loss = loss - torch.where(labelled > 0, log_q.gather(-1, wanted).squeeze(-1), 0) @ labelled
        onto = log_q.exp().scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=z.dtype))
        slope += torch.where(labelled[:, None] > 0, onto, 0).mul_(labelled[:, None])
    return loss, slope
