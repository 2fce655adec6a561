"""The tensors of a model that have a part for each expert, and how the parts of removed experts go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_cod.layers.experts import ExpertMatrix, ExpertSet
from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.stack import DecoderLayers

# (experts, ...) -> the same for the kept ones: what stands in place of an index, when experts are merged.
Mixing = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """A tensor from which the removed experts go.

    Attributes:
        owner, key: where it is.
        experts: name of the mixture.
        dim: the dimension that counts experts.
        count: number of experts.
        mixed: whether it is of the experts themselves, not of the router.
    """

    owner: nn.Module
    key: str
    experts: str
    dim: int
    count: int
    mixed: bool

    @torch.no_grad()
    def apply(self, kept: Sequence[int], mixing: Mixing | None, changes: Changes) -> None:
        """Puts a smaller tensor in its place."""
        old = getattr(self.owner, self.key)
        blocks = old.detach().movedim(self.dim, 0)
        blocks = blocks.reshape(self.count, len(blocks) // self.count, *blocks.shape[1:])
        index = torch.tensor([*kept], device=old.device)
        new = blocks.index_select(0, index) if mixing is None else mixing(blocks)
        new = new.flatten(0, 1).movedim(0, self.dim).contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        changes.set(self.owner, self.key, new)


@torch.no_grad()
def mix_listed(experts: ExpertSet, kept: Sequence[int], mixing: Mixing, changes: Changes) -> None:
    """Puts mixed parameters in the place of those of kept experts that are modules."""
    for name, _ in experts.modules[0].named_parameters():
        path, _, key = name.rpartition(".")
        owners = [module.get_submodule(path) for module in experts.modules]
        old = [getattr(owner, key) for owner in owners]
        for expert, new in zip(kept, mixing(torch.stack([p.detach() for p in old])), strict=True):
            changes.set(owners[expert], key, nn.Parameter(new.clone(), requires_grad=old[expert].requires_grad))


def find_cuts(stack: DecoderLayers, rebuilt: DecoderLayers, sets: Mapping[str, ExpertSet], left: int) -> Iterator[Cut]:
    """The tensors that are smaller in a model with fewer experts.

    Args:
        stack: the layers.
        rebuilt: those of a model built from the changed config.
        sets: name -> experts.
        left: number of experts that are left of each of them.

    Raises:
        ValueError: a tensor that is no part of experts and router, or has no part for each expert; or a table of
            experts by token (hash routing of DeepSeek-V4).
    """
    parts = {name: _around(experts) for name, experts in sets.items()}
    others = dict(rebuilt.model.named_modules())
    owners: dict[int, str] = {}
    for name, module in stack.model.named_modules():
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place = f"{name}.{key}"
            there = getattr(others.get(name), key, None)
            holding = [part for part in parts if place.startswith(f"{parts[part]}.")]
            if holding and tensor.numel() > 1 and not (tensor.is_floating_point() or tensor.dtype == torch.bool):
                raise ValueError(
                    f"model: expected routers that choose experts by scores alone, got whole numbers in {place}, which "
                    "may name experts by token"
                )
            if not isinstance(there, Tensor) or there.shape == tensor.shape:
                continue
            if owners.setdefault(id(tensor), place) != place or tensor.is_meta:
                raise ValueError(f"model: expected weights of their own in memory, got {place}")
            dim = _dimension(tensor.shape, there.shape, sets[holding[0]].count / left) if holding else None
            if dim is None or not _is_by_expert(tensor.shape[dim], sets[holding[0]], place):
                raise ValueError(
                    f"model: expected only weights of experts and routers to depend on the number of experts, got "
                    f"{place} of shape {tuple(tensor.shape)}, which would be {tuple(there.shape)}"
                )
            experts = sets[max(holding, key=lambda part: len(parts[part]))]
            mixed = any(place.startswith(f"{bank}.") for bank in experts.places)
            yield Cut(module, key, experts.name, dim, experts.count, mixed)


def _around(experts: ExpertSet) -> str:
    """The name of the smallest module around experts and router."""
    if experts.router is None:
        return experts.name
    one, other = experts.name.split("."), experts.router.name.split(".")
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return ".".join(one[:length])


def _dimension(mine: Sequence[int], other: Sequence[int], ratio: float) -> int | None:
    """The only dimension that differs, if it does so by the ratio of the numbers of experts."""
    if len(mine) != len(other):
        return None
    found = [dim for dim, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
    return found[0] if len(found) == 1 and math.isclose(mine[found[0]], other[found[0]] * ratio) else None


def _is_by_expert(size: int, experts: ExpertSet, place: str) -> bool:
    """Whether a dimension has one entry for each expert, or is that of a stack, which has as many for each."""
    stacked = [m.name for m in experts.matrices if isinstance(m, ExpertMatrix) and m.parameter.dim() == 2]
    return size == experts.count or place in stacked
