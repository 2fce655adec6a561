"""LoRA on a matrix with zeros that stay 0.

    y = x (W + m * (alpha / r) B A)^T,   m = 1 where W is not zero        (* elementwise)

The mask m is part of the forward pass (as in SPP, arXiv 2405.16057, and LoRS, arXiv 2501.08582), so the merged weight
is the trained one. With LoRA's own forward pass and a mask at the merge only, the part of B A at the positions of zeros
would be lost: at 70 % sparsity that is most of it, and the rest was trained together with that part.
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


def adapted_weight(adapter: Any) -> nn.Parameter:
    """The weight that a LoRA layer is added to: of its Linear, or a parameter of a bank of experts."""
    weight: nn.Parameter = getattr(adapter.get_base_layer(), _key(adapter))
    return weight


def mask_forward(adapter: Any) -> None:
    """Replaces a LoRA layer's forward pass by the formula at the top of this file."""
    inner, name = adapter.base_layer, _key(adapter)
    while inner is not adapter.get_base_layer():  # adapters of several parameters of one bank are nested
        inner, name = inner.base_layer, f"base_layer.{name}"

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(adapter.base_layer, {name: masked_sum(adapter)}, (x, *args), kwargs)

    adapter.forward = forward


def masked_sum(adapter: Any) -> Tensor:
    """W + m * (alpha / r) B A, in the dtype and layout of W."""
    W = adapted_weight(adapter)
    delta = adapter.get_delta_weight(ADAPTER)
    return torch.where(W != 0, W.to(delta.dtype) + delta, 0).to(W.dtype)


@torch.no_grad()
def merge_masked(adapter: Any) -> None:
    """Writes the masked sum into W."""
    adapted_weight(adapter).copy_(masked_sum(adapter))


def _key(adapter: Any) -> str:
    return str(getattr(adapter, "parameter_name", "weight"))
