"""SparseLinear: a Linear whose matrix is stored without its zeros, and multiplied without them on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.compression.sparse.format import check, pack, unpack
from hf_cod.compression.sparse.product import multiply, sparse_linear


class SparseLinear(nn.Linear):
    """y = x W^T + b with W in the bitmask format; W is frozen, adapters on the layer (PEFT) can be trained.

    A kernel, which is compiled on first use, multiplies up to 16 tokens directly from the format. It uses AVX-512 or
    AVX2; on other processors it is slower than a dense product. For more tokens, blocks of rows are made dense. Without
    a C++ compiler, and on devices other than the CPU, a dense copy is kept and used.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is a b.
        nonzeros: the number of stored weights.
        device: of the tensors, which are not initialized.
        dtype: of W.
    """

    mask: Tensor
    values: Tensor
    row_starts: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nonzeros: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own, which makes a dense weight
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty
        self.register_buffer("mask", empty(out_features, (in_features + 7) // 8, dtype=torch.uint8, device=device))
        self.register_buffer("values", empty(nonzeros, dtype=dtype, device=device))
        self.register_buffer("row_starts", empty(out_features + 1, dtype=torch.int64, device=device))
        self.register_parameter("bias", nn.Parameter(empty(out_features, dtype=dtype, device=device)) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """A packed copy; the bias is shared."""
        mask, values, row_starts = pack(linear.weight.detach())
        packed = cls(linear.in_features, linear.out_features, False, nonzeros=0, device="meta")
        packed.mask, packed.values, packed.row_starts = mask, values, row_starts
        packed.register_parameter("bias", linear.bias)
        return packed.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A dense copy; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.unpack(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1 - len(self.values) / max(1, self.in_features * self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (out_features, in_features) as a new dense tensor; an assignment to its `data` raises an error."""
        return self.unpack().as_subclass(_Decoded)

    def unpack(self) -> Tensor:
        """W (out_features, in_features) as a new dense tensor."""
        return unpack(self.mask, self.values, self.in_features)

    def check(self, name: str) -> None:
        """Checks that the tensors are consistent; tensors that accelerate offloads to disk are not checked.

        Raises:
            ValueError: they are not; begins with the module's `name`.
        """
        if any(tensor.is_meta for tensor in (self.mask, self.values, self.row_starts)):
            return
        check(self.mask, self.values, self.row_starts, self.in_features, name)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if input.shape[-1] != self.in_features:
            raise ValueError(f"input: expected (..., {self.in_features}), got {tuple(input.shape)}")
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(self.values.dtype)
        tensors = input, self.mask, self.values, self.row_starts, self.bias
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, self.bias))
        # Only autograd and torch.compile need the operator; its overhead is as long as a small product.
        return sparse_linear(*tensors) if learns or torch.compiler.is_compiling() else multiply(*tensors)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:.3f}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.check(prefix.rstrip("."))  # the kernel trusts the tensors


class _Decoded(Tensor):
    """A read-only copy: an assignment to its `data`, as in a merge of adapters, would be lost without an error."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(
            "weight: expected no change to a packed matrix, got one (a merge of adapters, or adapters whose "
            "initialization changes it: pissa, olora); call model.dequantize() first, and hf_cod.pack_sparse afterwards"
        )
