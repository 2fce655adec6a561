"""bitsandbytes' 4-bit layer, adapted so that saving, loading and training with adapters are correct."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.compression.quantization.bnb_decoding import (
    DECODED,
    Params4bit,
    QuantState,
    dequantize_nf4,
    dequantize_scales,
    dynamic_code,
    get_4bit_type,
    matmul_4bit,
)
from hf_cod.compression.quantization.bnb_decoding import Linear4bit as StockLinear4bit
from hf_cod.compression.quantization.format import prepared, stored_columns
from hf_cod.compression.quantization.product import Scales
from hf_cod.compression.quantization.scales import NESTED_BLOCK, BlockScales


class Linear4bit(StockLinear4bit):
    """bitsandbytes' NF4 layer; its file holds codes and scales, but not the tables that are the same for all layers.

    Its weight is never repacked for the CPU in evaluation mode. bitsandbytes 0.50 does that, and gradients and saved
    weights are wrong afterwards.

    Args:
        in_features, out_features: K, N; rows are stored padded with zeros to a multiple of `block`.
        bias: whether the layer has a bias.
        block: number of weights of a row that share a scale.
        double_quant: whether scales are quantized, too.
        compute_dtype: dtype of the product; None: the input's dtype.
        device, dtype: of the tensors, which are not initialized; dtype is the bias's.
    """

    bits = 4
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
        super().__init__(in_features, out_features, False, compute_dtype, double_quant, "nf4", device="meta")
        self.block, self.support_avx512bf16_for_cpu = block, False
        self.columns = stored_columns(in_features, block)
        codes = torch.empty(out_features * self.columns // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = BlockScales(out_features * self.columns // block, double_quant, device)
        bias_of = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_of)

    def bind(self) -> None:
        """Converts the weight to the class that bitsandbytes and PEFT expect: a Params4bit with its scales."""
        if self.weight.device.type != "meta":
            self.weight = Params4bit(
                self.weight.data,
                quant_state=self._state(),
                blocksize=self.block,
                compress_statistics=self.scales.double_quant,
                quant_type="nf4",
                bnb_quantized=True,
                module=self,
            )

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out_features, in_features) as a new dense tensor, float32 if no dtype is given."""
        self._adopt()
        scales = dequantize_scales(*self.scales()).view(self.out_features, -1)
        codes = self.weight.data.view(self.out_features, -1)
        W = dequantize_nf4(codes, scales, self.block, dtype or torch.float32)
        return W[:, : self.in_features].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        computed = prepared(x, self.in_features, self.block, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(computed.dtype)
        if computed.dtype not in DECODED:
            W = nn.functional.pad(self.unpack(computed.dtype), (0, self.columns - self.in_features))
            return nn.functional.linear(computed, W, bias).to(x.dtype)
        state = getattr(self.weight, "quant_state", None) or self._state()
        return matmul_4bit(computed, self.weight, state, bias=bias).to(x.dtype)

    def _state(self) -> QuantState:
        shape = self.out_features, self.columns
        return quant_state(self.scales(), shape, self.block, self.compute_dtype or torch.float32)

    @torch.no_grad()
    def _adopt(self) -> None:
        """Adopts the scales of a weight that was replaced from outside: a merge of adapters quantizes again."""
        state: Any = getattr(self.weight, "quant_state", None)
        if state is None or state.absmax.data_ptr() == self.scales.absmax.data_ptr():
            return
        found = {"absmax": state.absmax}
        if state.nested:
            found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        for name, tensor in found.items():
            setattr(self.scales, name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        self._adopt()
        super()._apply(fn, recurse)
        if isinstance(self.weight, Params4bit):
            self.bind()  # one copy of the scales on the new device, not two
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bind()  # the weight of a copy refers to the copy's scales

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._adopt()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """The description in `print(model)`."""
        return f"{nn.Linear.extra_repr(self)}, bits={self.bits}, block={self.block}"


def product_4bit(x: Tensor, codes: Tensor, scales: Scales, block: int) -> Tensor:
    """x (..., K) times W^T, of codes (N, K / 2) and their scales: (..., N)."""
    if x.dtype not in DECODED:
        return nn.functional.linear(x, dequantize_nf4(codes, dequantize_scales(*scales), block, x.dtype))
    state = quant_state(scales, (len(codes), x.shape[-1]), block, x.dtype)
    return matmul_4bit(x, codes.view(-1, 1), state)


def quant_state(scales: Scales, shape: tuple[int, int], block: int, dtype: torch.dtype) -> QuantState:
    """The scales of a matrix (N, K) as bitsandbytes' QuantState, without a copy."""
    absmax, nested, offset = scales
    code = _nf4_code(absmax.device)
    inner = None
    if nested is not None:
        inner = QuantState(nested, code=dynamic_code(nested.device), blocksize=NESTED_BLOCK, dtype=torch.float32)
    return QuantState(absmax, torch.Size(shape), code, block, "nf4", dtype, offset, inner)


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return get_4bit_type("nf4", device=device)
