"""QuantizedExperts: one matrix of each expert of a bank, in three or four bits a weight."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.compression.quantization.format import prepared, stored_columns
from hf_cod.compression.quantization.product import Scales, decoded_matrix, has_grouped_kernel, linear, multiply_codes
from hf_cod.compression.quantization.scales import BlockScales
from hf_cod.compression.quantization.widths import Width, code_bytes, widths_of
from hf_cod.models.expert_parameters import ExpertParameter


class QuantizedExperts(ExpertParameter):
    """The matrices W_e (N, K) of E experts; each is stored as that of a `Linear3bit` or of a `Linear4bit`.

    | tensor | shape | content |
    |---|---|---|
    | weight | (bytes,) uint8 | codes: of the experts of four bits, then of those of three, both in order |
    | scales | (E, ...) | `BlockScales` of each expert |

    A product decodes at most one matrix. For few tokens, codes are multiplied directly (`product.py`); on CUDA, without
    gradients, those of all experts in one launch, for any number of tokens.

    Args:
        shape, experts, transposed, place, dtype: see `ExpertParameter`.
        bits: of all experts, or a digit for each.
        block: number of weights of a row that share a scale.
        double_quant: whether scales are quantized, too.
        compute_dtype: dtype of products; None: the input's dtype.
        device: of the tensors, which are not initialized.
    """

    def __init__(
        self,
        shape: torch.Size,
        experts: int,
        transposed: bool,
        place: int,
        dtype: torch.dtype,
        bits: Width,
        *,
        block: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, experts, transposed, place, dtype)
        self.bits, self.block, self.compute_dtype = bits, block, compute_dtype
        self.widths = widths_of(bits, experts)
        out, width = self.matrix_shape
        self.columns = stored_columns(width, block)
        self._starts, total = _starts(self.widths, out * self.columns)
        self.weight = nn.Parameter(torch.empty(total, dtype=torch.uint8, device=device), requires_grad=False)
        self.scales = BlockScales(out * self.columns // block, double_quant, device, experts)

    def forward(self) -> tuple[Tensor, Scales]:
        """(codes, scales)."""
        return self.weight, self.scales()

    def product(self, tensors: Any, x: Tensor, expert: int) -> Tensor:
        """x (..., in) times W^T of one expert: (..., out) in x's dtype."""
        computed = prepared(x, self.matrix_shape[1], self.block, self.compute_dtype)
        codes, scales = self.matrix_of(tensors, expert)
        if self.widths[expert] == 3:
            return linear(computed, codes, scales, self.block).to(x.dtype)
        if computed.is_cpu and not (computed.requires_grad and torch.is_grad_enabled()):
            return multiply_codes(computed, codes, scales, self.block, None, 4).to(x.dtype)
        from hf_cod.compression.quantization.bnb import product_4bit

        return product_4bit(computed, codes, scales, self.block).to(x.dtype)

    def grouped_product(self, tensors: Any, x: Tensor, ends: Tensor) -> Tensor | None:
        """On CUDA, in one launch for all experts (`triton_experts.py`); None where there is no such kernel, and for
        inputs that need a gradient.
        """
        computed = prepared(x, self.matrix_shape[1], self.block, self.compute_dtype)
        if not has_grouped_kernel(computed):
            return None
        from hf_cod.compression.quantization.triton_experts import grouped_product

        codes, scales = tensors
        places = _places_on(codes.device, self.bits, self.experts, self.matrix_shape[0] * self.columns)
        out = self.matrix_shape[0]
        found = grouped_product(computed, ends, codes, places, scales, self.block, out)
        return found.to(x.dtype)

    def decoded(self, tensors: Any, expert: int, dtype: torch.dtype) -> Tensor:
        """W (out, in) of one expert, as a new tensor."""
        codes, scales = self.matrix_of(tensors, expert)
        W = decoded_matrix(codes, scales, self.widths[expert], self.block, dtype)
        return W[:, : self.matrix_shape[1]].contiguous()

    def matrix_of(self, tensors: tuple[Tensor, Scales], expert: int) -> tuple[Tensor, Scales]:
        """(codes (N, ...), scales) of one expert, as a module of one matrix has them.

        Args:
            tensors: what `forward` returned.
            expert: its number.
        """
        weight, scales = tensors
        out, bits = self.matrix_shape[0], self.widths[expert]
        codes = weight.narrow(0, self._starts[expert], code_bytes(out * self.columns, bits)).view(out, -1)
        absmax, nested, offset = (None if part is None else part[expert] for part in scales)
        assert absmax is not None
        return codes, (absmax, nested, offset)

    def extra_repr(self) -> str:
        """The description in `print(model)`."""
        return f"{tuple(self.shape)}, bits={self.bits}, block={self.block}"


def joined(matrices: list[dict[str, Tensor]], widths: list[int]) -> dict[str, Tensor]:
    """The tensors of a module, of those of `round_matrix` for each expert.

    Args:
        matrices: in the order of the experts.
        widths: their bits.
    """
    order = sorted(range(len(widths)), key=lambda expert: -widths[expert])  # stable
    found = {"weight": torch.cat([matrices[expert]["weight"].flatten() for expert in order])}
    for name in matrices[0]:
        if name != "weight":
            found[name] = torch.stack([matrix[name] for matrix in matrices])
    return found


@cache
def _places_on(device: torch.device, bits: Width, experts: int, weights: int) -> Tensor:
    """(2, experts): the first byte of each expert's codes, and its bits; one tensor for all banks of a shape."""
    widths = widths_of(bits, experts)
    return torch.tensor([_starts(widths, weights)[0], widths], device=device)


def _starts(widths: list[int], weights: int) -> tuple[list[int], int]:
    """(The first byte of each expert's codes, the number of all bytes)."""
    starts, total = [0] * len(widths), 0
    for expert in sorted(range(len(widths)), key=lambda expert: -widths[expert]):
        starts[expert] = total
        total += code_bytes(weights, widths[expert])
    return starts, total
