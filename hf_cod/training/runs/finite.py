"""Checks that weights are finite numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with NaN or infinite values; codes of quantized weights are always finite."""
    return [name for name, tensor in tensors if _has_values(tensor) and not bool(torch.isfinite(tensor).all())]


def check_trained(model: nn.Module) -> None:
    """Checks the weights of a model after training.

    Raises:
        RuntimeError: some are NaN or infinite; names the first.
    """
    bad = not_finite(model.named_parameters())
    # Buffers may hold infinities by design, such as masks.
    bad += [name for name, buffer in model.named_buffers() if _has_values(buffer) and bool(torch.isnan(buffer).any())]
    if bad:
        others = f" and {len(bad) - 1} other tensors" if bad[1:] else ""
        raise RuntimeError(
            f"weights: expected finite numbers after training, got NaN or infinity in {bad[0]}{others}; lower "
            "--learning-rate"
        )


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.device.type != "meta"
