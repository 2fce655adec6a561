"""Selects the matrices of a model to pack, and replaces their modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

from hf_cod.compression.sparse.linear import SparseLinear
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.experts import expert_matrices
from hf_cod.layers.modules import walk
from hf_cod.layers.orientation import is_linear, is_plain, is_transposed
from hf_cod.layers.replacement_modules import replace

logger = logging.getLogger(__name__)


def pack_linears(model: nn.Module, min_sparsity: float) -> dict[str, int]:
    """Packs each Linear in which at least the share `min_sparsity` is zero, one at a time; others are left unchanged.

    Returns:
        Name -> number of stored weights.

    Raises:
        ValueError: see `pack_sparse`; the model is left unchanged.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("model: expected one without adapters, got some; merge or remove them first")
    use = check_unwritten(model)
    chosen, most = [], (0.0, "no matrix")
    for name, linear in _own_linears(model):
        if name in use.reasons:
            logger.warning("%s is not packed: %s", name, use.reasons[name])
            continue
        if linear.weight.device.type == "meta":
            raise ValueError(f"model: expected weights in memory, got offloaded ones ({name})")
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError(f"model: expected finite weights, got NaN or inf in {name}")
        zeros = 1 - linear.weight.count_nonzero().item() / max(1, linear.weight.numel())
        most = max(most, (zeros, name))
        if zeros >= min_sparsity:
            chosen.append(name)
    banks = _sparse_banks(model, min_sparsity)
    if not chosen and not any(isinstance(module, SparseLinear) for module in model.modules()):
        turned = any(is_linear(module) and is_transposed(module) for module in model.modules())
        others = " and Conv1D, which is not packed" if turned else ""
        others += " and banks of experts, which are not packed" if banks else ""
        raise ValueError(
            f"min_sparsity: expected a model with a Linear in which at least {min_sparsity:.0%} is zero, got at most "
            f"{most[0]:.1%} ({most[1]}){others}; prune it first"
        )
    for note in use.notes(chosen):
        logger.warning("%s", note)
    if banks:
        logger.warning(
            "%d matrices of banks of experts with %s weights are not packed, and take as much memory as dense ones",
            len(banks),
            f"{sum(banks.values()):,}",
        )
    counts = {}
    for name in chosen:
        packed = SparseLinear.from_linear(model.get_submodule(name))  # type: ignore[arg-type]
        replace(model, name, packed)
        counts[name] = len(packed.values)
    return counts


def _sparse_banks(model: nn.Module, min_sparsity: float) -> dict[str, int]:
    """Name -> number of weights of the dense matrices of banks of experts of which so many are zero."""
    found: dict[str, int] = {}
    for matrix in expert_matrices((name.lstrip("."), module) for name, module in walk(model, "")):
        p = matrix.parameter
        if isinstance(p, nn.Parameter) and not p.is_meta:
            zeros = 1 - int(p.count_nonzero()) / max(1, p.numel())
            found |= {matrix.name: p.numel()} if zeros >= min_sparsity else {}
    return found


def _own_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name -> each dense Linear that is used in one place and does not share its weight with another module."""
    modules = [(name.lstrip("."), module) for name, module in walk(model, "")]
    owners: dict[int, int] = {}
    for _, module in modules:
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in modules:
        # Other subclasses of Linear are already quantized or packed.
        if isinstance(module, nn.Linear) and is_plain(module) and owners[id(module.weight)] == 1:
            yield name, module
