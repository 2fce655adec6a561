"""Which matrices can be quantized, and why others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import Size
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.experts import ExpertMatrix
from hf_cod.layers.orientation import is_plain, shape_of
from hf_cod.layers.sensitive_modules import sensitive_modules
from hf_cod.layers.stack import DecoderLayers


def quantizable(
    stack: DecoderLayers, storage: StorageSettings, skip: Sequence[str] = ()
) -> tuple[list[dict[str, Size]], dict[str, str]]:
    """Name -> (out, in), or (experts, out, in), of the quantizable matrices of each layer; and name -> the reason, for
    all other matrices that `stack` lists. Routers, gates and latent projections are quantizable if `stack` includes
    them by name. Factors of a bank are matrices of their own.
    """
    layers: list[dict[str, Size]] = []
    use = direct_use(stack.model)
    sensitive = sensitive_modules(stack, use.latent)
    left: dict[str, str] = {}
    owners = Counter(id(p) for _, p in stack.model.named_parameters(remove_duplicate=False))
    for index in range(len(stack)):
        layers.append({})
        for name, module in stack.linears(index).items():
            size, reason = shape_of(module), _reason(name, module, skip, owners) or use.reasons.get(name)
            if name not in stack.included:
                reason = reason or sensitive.get(name)
            if reason:
                left[name] = reason
            else:
                layers[-1][name] = size
        for matrix in stack.expert_matrices(index):
            for part in matrix.parts():
                reason = _reason_of_bank(part, skip, owners) or use.unpackable.get(part.name)
                if reason:
                    left[part.name] = reason
                else:
                    layers[-1][part.name] = (part.experts, *part.shape)
    return layers, left


def _reason(name: str, module: Any, skip: Sequence[str], owners: Counter[int]) -> str | None:
    """The reason why a matrix cannot be quantized, or None."""
    out, width = shape_of(module)
    if any(part in name for part in skip):
        return "skipped"
    if not is_plain(module):
        return f"a {type(module).__name__}, which computes something else than a Linear"
    if owners[id(module.weight)] > 1:
        return "it shares its weight with another module"
    if not out * width:
        return "it has no weights"
    return None


def _reason_of_bank(matrix: ExpertMatrix, skip: Sequence[str], owners: Counter[int]) -> str | None:
    """The reason why the matrices of a bank cannot be quantized, or None."""
    if any(part in matrix.name for part in skip):
        return "skipped"
    if owners[id(matrix.parameter)] > 1:
        return "it shares its weight with another module"
    return None if matrix.parameter.numel() else "it has no weights"
