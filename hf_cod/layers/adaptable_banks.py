"""Whether adapters of PEFT can be added to a bank of experts."""

from __future__ import annotations

import torch
from torch import nn

from hf_cod.layers.experts import ExpertMatrix
from hf_cod.models.expert_parameters import ExpertParameter

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_not_adaptable(matrix: ExpertMatrix, lora: bool = False) -> str | None:
    """The reason why adapters of PEFT cannot be added to a matrix of a bank; None if they can.

    Args:
        matrix: of the bank.
        lora: PEFT's own LoRA; False: adapters of this package.
    """
    parameter = matrix.parameter
    if isinstance(parameter, ExpertParameter):
        return "a bank of packed experts; PEFT adapts parameters of numbers"
    if parameter.dim() != 3:
        return "experts stacked in a parameter of two dimensions, which PEFT would adapt as one matrix"
    if type(parameter) is not nn.Parameter or parameter.dtype not in FLOATS:
        return f"a bank of {str(parameter.dtype).removeprefix('torch.')}; PEFT adapts parameters of numbers"
    if lora and is_misoriented(matrix.module, matrix.experts):
        return "a bank of one expert stored as (in, out), which PEFT would adapt as (out, in)"
    return None


def is_misoriented(bank: nn.Module, experts: int) -> bool:
    """Whether PEFT would add the transposed product to the matrices: it reads `is_transposed` of larger banks only."""
    return experts == 1 and bool(getattr(bank, "is_transposed", False))
