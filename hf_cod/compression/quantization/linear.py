"""Linear3bit: a Linear whose matrix is stored in three bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.compression.quantization.codes import Codes, shown
from hf_cod.compression.quantization.format import prepared, stored_columns
from hf_cod.compression.quantization.product import decoded_rows, linear
from hf_cod.compression.quantization.scales import BlockScales


class Linear3bit(nn.Linear):
    """y = x W^T + b with W in three bits; W is frozen, adapters on the layer (PEFT) can be trained.

    Args:
        in_features, out_features: K, N; rows are stored padded with zeros to a multiple of `block`.
        bias: whether there is a b.
        block: number of weights of a row that share a scale.
        double_quant: whether scales are quantized, too.
        compute_dtype: dtype of the product; None: the input's dtype.
        device, dtype: of the tensors, which are not initialized; dtype is the bias's.
    """

    bits = 3
    scales: BlockScales

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own, which makes a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.block, self.compute_dtype = block, compute_dtype
        columns = stored_columns(in_features, block)
        planes = torch.empty(out_features, columns * 3 // 8, dtype=torch.uint8, device=device)
        self._parameters["weight"] = nn.Parameter(planes, requires_grad=False)
        self.scales = BlockScales(out_features * columns // block, double_quant, device)
        bias_of = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_of)

    @property
    def weight(self) -> Codes:  # type: ignore[override]
        """A view of the planes, for reads of their device or shape; the parameter itself is in `parameters()`."""
        return shown(self._planes)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out_features, in_features) as a new dense tensor, float32 if no dtype is given."""
        absmax, nested, offset = self.scales()
        found = decoded_rows(self._planes, absmax, nested, offset, self.block, dtype or torch.float32)
        return torch.cat([W[:, : self.in_features] for _, W in found])

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        x = prepared(input, self.in_features, self.block, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self._planes, self.scales(), self.block, bias).to(input.dtype)

    @property
    def _planes(self) -> Tensor:
        planes = self._parameters["weight"]
        assert planes is not None
        return planes

    def extra_repr(self) -> str:
        """The description in `print(model)`."""
        return f"{super().extra_repr()}, bits={self.bits}, block={self.block}"
