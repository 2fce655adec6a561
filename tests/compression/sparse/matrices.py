"""Random matrices and models with zeros."""

import torch
from torch import nn

from tests.tiny_models import build

# (rows, columns): a single weight, widths on both sides of 8, 16, 32 and 512, odd numbers of rows.
SHAPES = [(1, 1), (3, 7), (5, 8), (2, 16), (6, 31), (9, 33), (37, 65), (64, 96), (11, 513), (130, 1031)]


def matrix(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 10_000 + columns)
    W = torch.randn(rows, columns, generator=generator)
    return (W * (torch.rand(rows, columns, generator=generator) >= sparsity)).to(dtype)


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = 0.7) -> nn.Module:
    """Sets weights of each Linear but the head to zero, at random."""
    generator = torch.Generator().manual_seed(2)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "head" not in name:
            module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= sparsity)
    return model


def sparse_model(family: str = "llama", sparsity: float = 0.7, **options):
    return prune(build(family, **options), sparsity)
