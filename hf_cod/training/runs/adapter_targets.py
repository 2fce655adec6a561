"""The matrices of the layers that adapters are added to, and those that get none, with the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn

from hf_cod.io.peft_names import is_misread, is_refused
from hf_cod.layers.adaptable_banks import FLOATS, why_not_adaptable
from hf_cod.layers.devices import check_not_offloaded
from hf_cod.layers.direct_use import not_adaptable
from hf_cod.layers.module_choice import by_place
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stack import DecoderLayers

_REFUSED = "PEFT adds no LoRA to modules of this name in models of this type"
_MISREAD = "PEFT reads its name as that of experts, and its weight is no parameter of numbers"


@dataclass(frozen=True)
class AdapterTargets:
    """Names of matrices -> number of weights.

    Attributes:
        modules: Linear-like modules that get an adapter.
        banks: matrices of banks of experts that do. Each expert's matrix gets a product of the adapter's rank.
        left: matrices that get none.
        reasons: name of a matrix in `left` -> the reason.
        others: class of module -> number of weights of the layers in no matrix, which get none either.
        misread: the names in `modules` that PEFT misreads, see `is_misread`.
    """

    modules: Mapping[str, int] = field(default_factory=dict)
    banks: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    misread: Collection[str] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    def for_lora(self) -> dict[str, Any]:
        """`target_modules` and `target_parameters` of PEFT's LoraConfig.

        Names are complete, because a factorized layer has other modules than a dense one.
        """
        modules = [name for name in self.modules if name not in self.misread]
        parameters = [*self.banks, *(f"{name}.weight" for name in self.misread)]
        return {"target_modules": modules, "target_parameters": parameters or None}

    def notes(self) -> list[str]:
        """Sentences for a report that count the matrices with adapters, and name those without."""
        adapted = sum(self.modules.values()) + sum(self.banks.values())
        total = adapted + sum(self.left.values())
        banks = f", {len(self.banks)} of them in banks of experts," if self.banks else ""
        notes = [
            f"{_count(len(self.modules) + len(self.banks))}{banks} with adapters: {adapted:,} of {total:,} weights "
            f"({adapted / max(1, total):.1%})"
        ]
        for reason in dict.fromkeys(self.reasons.values()):
            names = [name for name, why in self.reasons.items() if why == reason]
            weights = sum(self.left[name] for name in names)
            told = f"{_count(len(names))} of {weights:,} weights without adapters ({reason})"
            notes.append(f"{told}: {'; '.join(by_place(names))}")
        if self.others:
            kinds = ", ".join(f"{name} ({weights:,})" for name, weights in sorted(self.others.items()))
            told = f"{sum(self.others.values()):,} weights of the layers without adapters"
            notes.append(f"{told}, because they are in no matrix: {kinds}")
        return notes


def adapter_targets(stack: DecoderLayers, lora: bool = True) -> AdapterTargets:
    """The matrices of the layers that get adapters, except those that `stack` excludes.

    Args:
        stack: the layers, without adapters.
        lora: PEFT's LoRA, which requires the peft package; False: OwLore adapters, which do not misread names.

    Raises:
        ValueError: none is left; offloaded layers.
    """
    check_not_offloaded(stack.model, stack.module_list.parameters())
    reasons, sizes, misread = not_adaptable(stack), dict[str, int](), list[str]()
    is_replaced, is_left_out = (cache(partial(ask, stack.model)) for ask in (is_misread, is_refused))
    banks: set[str] = set()
    for index in range(len(stack)):
        for name, module in stack.linears(index).items():
            sizes[name] = math.prod(shape_of(module))
            end = name.rpartition(".")[2]
            if lora and name not in reasons and is_left_out(end):
                reasons[name] = _REFUSED
            if lora and name not in reasons and is_replaced(end):
                misread.append(name)
                if not _is_float(getattr(module, "weight", None)):
                    reasons[name] = _MISREAD
        for matrix in stack.expert_matrices(index):
            sizes[matrix.name] = matrix.parameter.numel()
            banks.add(matrix.name)
            reason = why_not_adaptable(matrix, lora)
            if reason is not None:
                reasons[matrix.name] = reason
    if not sizes.keys() - reasons.keys():
        raise ValueError("include: expected matrices that adapters can be added to, got none of them")
    found = {name: size for name, size in sizes.items() if name not in reasons}
    return AdapterTargets(
        {name: size for name, size in found.items() if name not in banks},
        {name: size for name, size in found.items() if name in banks},
        {name: size for name, size in sizes.items() if name in reasons},
        {name: reasons[name] for name in sizes if name in reasons},
        [name for name in misread if name in found],
        sum((stack.other_weights(index) for index in range(len(stack))), Counter[str]()),
    )


def _is_float(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS


def _count(matrices: int) -> str:
    return "1 matrix" if matrices == 1 else f"{matrices} matrices"
