"""Whether a bank of experts works with packed matrices, for `direct_use.py`: its forward pass is tried with some.

Packed matrices (`expert_parameters.py`) are factors of products, one expert at a time. A bank that does something else
with its parameters fails at it here, instead of in a quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.experts import ExpertMatrix, expert_matrices
from hf_cod.layers.modules import walk
from hf_cod.models.expert_parameters import ExpertParameter, parameters_of


class _Watched(ExpertParameter):
    """In the place of a dense parameter. Products are zeros: what they are does not matter, and takes time."""

    def __init__(self, matrix: ExpertMatrix) -> None:
        place = [key for key, _ in parameters_of(matrix.module)].index(matrix.key)
        parameter = matrix.parameter
        super().__init__(parameter.shape, matrix.experts, matrix.transposed, place, parameter.dtype)
        self._device = parameter.device

    @property
    def device(self) -> torch.device:
        """That of the parameter."""
        return self._device

    def forward(self) -> None:
        """No tensors."""

    def product(self, tensors: Any, x: Tensor, expert: int) -> Tensor:
        """Zeros (..., out)."""
        if x.shape[-1] != self.matrix_shape[1]:
            raise ValueError(f"input: expected (..., {self.matrix_shape[1]}), got {tuple(x.shape)}")
        return x.new_zeros(*x.shape[:-1], self.matrix_shape[0])

    def decoded(self, tensors: Any, expert: int, dtype: torch.dtype) -> Tensor:
        """Zeros (out, in) that take no memory."""
        return torch.zeros((), dtype=dtype, device=self.device).expand(self.matrix_shape)


def watch_experts(model: nn.Module) -> dict[str, str]:
    """Puts watched matrices in the place of the parameters of all banks; the caller restores the modules.

    Returns:
        Name of a matrix -> why it cannot be packed; filled by forward passes.
    """
    reasons: dict[str, str] = {}
    banks = {name.lstrip("."): module for name, module in walk(model, "")}
    for name, module in banks.items():
        matrices = [
            matrix for matrix in expert_matrices([(name, module)]) if isinstance(matrix.parameter, nn.Parameter)
        ]
        if matrices:
            vars(module)["forward"] = _tried(module, matrices, module.forward, reasons)
            for matrix, watched in [(matrix, _Watched(matrix)) for matrix in matrices]:
                delattr(module, matrix.key)
                setattr(module, matrix.key, watched)
    return reasons


def _tried(
    module: nn.Module, matrices: Sequence[ExpertMatrix], forward: Callable[..., Any], reasons: dict[str, str]
) -> Callable[..., Any]:
    """A forward pass that takes the parameters themselves, if it fails with watched matrices."""
    dense = {matrix.key: matrix.parameter for matrix in matrices}

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception as error:  # whatever a forward raises on something else than a tensor
            told = " ".join(str(error).split())[:150]
        for key in dense.keys() & module._modules.keys():
            delattr(module, key)
            setattr(module, key, dense[key])
        out = forward(*args, **kwargs)  # raises, if the matrices were not the reason
        reasons.update(
            {matrix.name: f"its experts run by more than products with one matrix: {told}" for matrix in matrices}
        )
        return out

    return run
