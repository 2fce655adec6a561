"""BlockScales: one scale for each block of weights, in 8 or 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Number of scales that share a second-level scale, as in QLoRA (arXiv 2305.14314, section 3).
NESTED_BLOCK = 256


class BlockScales(nn.Module):
    """The scales of a matrix, row after row. The tensors keep their dtypes, also when the model is cast to another one.

    | tensor | shape, dtype | content |
    |---|---|---|
    | absmax | (n,) uint8, or float32 | the scales; with double quantization, the codes of scale minus offset |
    | nested_absmax | (ceil(n / 256),) float32 | the second-level scale of each 256 codes |
    | offset | () float32 | mean of the scales |

    For the matrices of several experts all shapes have one more dimension, the first one.

    Bits a weight at block 64: 8 / 64 + 32 / (64 * 256) = 0.127; without double quantization 0.5.

    Args:
        count: n, the number of scales of a matrix.
        double_quant: whether the scales are quantized, too.
        device: of the tensors, which are not initialized.
        experts: the number of experts; None: of one matrix.
    """

    absmax: nn.Parameter

    def __init__(self, count: int, double_quant: bool = True, device: Any = None, experts: int | None = None) -> None:
        super().__init__()
        first = () if experts is None else (experts,)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"absmax": ((*first, count), torch.float32)}
        if double_quant:
            nested = (count + NESTED_BLOCK - 1) // NESTED_BLOCK
            shapes = {
                "absmax": ((*first, count), torch.uint8),
                "nested_absmax": ((*first, nested), torch.float32),
                "offset": (first, torch.float32),
            }
        for name, (shape, dtype) in shapes.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized, too."""
        return "nested_absmax" in self._parameters

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(absmax, nested_absmax, offset). This is `forward`, so that hooks of accelerate load offloaded tensors."""
        tensors = self._parameters
        absmax = tensors["absmax"]
        assert absmax is not None
        return absmax, tensors.get("nested_absmax"), tensors.get("offset")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockScales:
        """Moves the tensors to other devices, but does not change their dtypes."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
