"""LoRA beside a matrix with zeros, which stay zeros.

    y = x (W + m * (alpha / r) B A)^T,   m = 1 where W is not zero        (* elementwise)

The mask m stands inside the forward pass (as in SPP, arXiv 2405.16057, and LoRS, arXiv 2501.08582), so that what was
trained is what is merged. LoRA's own forward pass without m, masked only when it merges, would lose the part of B A
that falls on zeros: at 70 % sparsity most of it, and the rest was trained to work together with that part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers of a model."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def mask_forward(adapter: Any) -> None:
    """Lets a LoRA layer compute the y above."""
    base = adapter.get_base_layer()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(base, {"weight": masked_sum(adapter)}, (x, *args), kwargs)

    adapter.forward = forward


def masked_sum(adapter: Any) -> Tensor:
    """W + m * (alpha / r) B A, in the dtype and layout of W."""
    W = adapter.get_base_layer().weight
    delta = adapter.get_delta_weight(ADAPTER)
    return torch.where(W != 0, W.to(delta.dtype) + delta, 0).to(W.dtype)


@torch.no_grad()
def merge_masked(adapter: Any) -> None:
    """Writes the masked sum into W."""
    adapter.get_base_layer().weight.copy_(masked_sum(adapter))
