"""Bit plans: which matrices get four bits within a budget of stored bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import nn

from hf_cod.compression.quantization.config import OwlBnbConfig, score_of
from hf_cod.compression.quantization.quantizable import quantizable
from hf_cod.compression.quantization.settings import BLOCKS, StorageFields, StorageSettings
from hf_cod.compression.quantization.units import FEW, MANY, Units, ranked, stored_names, within_budget, within_mean
from hf_cod.compression.quantization.widths import Size, Width, count_codes, is_width, stored_bits, widths_of
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.exporting import Exportable
from hf_cod.io.module_names import ModuleSettings, Names
from hf_cod.io.settings import resolve
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores

# Tolerance for a budget that the user rounded, in bits a weight.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class BitPlan(Exportable):
    """Bits of each matrix.

    Attributes:
        bits: name -> 3 or 4, in the order of the model; for the experts of a bank also a digit for each ("3343").
        sizes: name -> (out, in), or (experts, out, in) of a bank.
        stored: stored bits a weight, scales included, over all of these matrices.
        left: name -> the reason why a matrix of the layers is not quantized.
    """

    bits: dict[str, Width]
    sizes: dict[str, Size]
    stored: float
    left: dict[str, str]

    @property
    def weights(self) -> int:
        """Number of weights of these matrices."""
        return sum(map(math.prod, self.sizes.values()))

    def names(self, stack: DecoderLayers, index: int) -> list[str]:
        """The quantized matrices of a layer."""
        banks = [part.name for matrix in stack.expert_matrices(index) for part in matrix.parts()]
        return [name for name in (*stack.linears(index), *banks) if name in self.bits]

    def widths(self, name: str) -> list[int]:
        """The bits of each expert of a bank; of another matrix one number."""
        size = self.sizes[name]
        return widths_of(self.bits[name], size[0] if len(size) == 3 else 1)

    def mean_bits(self, name: str) -> float:
        """The mean of `widths`."""
        widths = self.widths(name)
        return sum(widths) / len(widths)


@renamed(storage="settings")
@checked
def plan_bits(
    model: nn.Module | DecoderLayers,
    bits: float,
    settings: StorageSettings | None = None,
    scores: LayerScores | None = None,
    skip: Sequence[str] = (),
    *,
    include: Names = None,
    exclude: Names = None,
    layers_path: str | None = None,
    expert_scores: ExpertScores | None = None,
    **fields: Unpack[StorageFields],
) -> BitPlan:
    """Gives four bits to the layers with the highest scores, as far as the budget of stored bits allows.

    Of layers with equal scores, the earlier one comes first; without scores all are equal. In the layer at which the
    budget is exhausted, some matrices get four bits, in the order of the model, those of experts expert by expert. The
    stored size therefore meets the budget within the size of one matrix.

    With scores of blocks or matrices, the parts with the highest scores get four bits; a part that does not fit the
    rest of the budget is skipped. Matrices that engines fuse (query, key and value; gate and up) are one part.

    With scores of experts, the matrices that all tokens enter (attention, shared experts) get four bits first, layer by
    layer, then the experts with the highest scores of all layers.

    Args:
        model: a transformers model, or its layers; it is not changed.
        bits: stored bits a weight, scales included; 3 or 4 means the same width for all.
        settings: how codes and scales are stored.
        scores: of this model, from `score_layers`.
        skip: parts of module names; matching matrices are not quantized.
        include, exclude: the matrices to quantize, as PEFT's target_modules and exclude_modules. Routers, gates of one
            row and latent projections are quantized only if `include` matches them.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        expert_scores: of this model, from `score_experts`.
        **fields: or fields of `StorageSettings` by name: block, double_quant.

    Raises:
        ValueError: no matrix can be quantized, the budget is out of range, or the scores are of another model.
    """
    storage = resolve(plan_bits, StorageSettings, settings, fields)
    stack = model if isinstance(model, DecoderLayers) else find_decoder_layers(model, layers_path)
    stack = choose_modules(stack, ModuleSettings(include, exclude)).stack
    layers, left = quantizable(stack, storage, skip)
    sizes = {name: size for layer in layers for name, size in layer.items()}
    if not sizes:
        why = "; ".join(dict.fromkeys(left.values())) or "the layers have no Linear"
        raise ValueError(f"model: expected a Linear in the layers that can be quantized, got none; {why}")
    if scores is not None:
        _check_scores(scores, stack)
    if expert_scores is not None:
        expert_scores.check(stack)
    weights, (least, most) = sum(map(math.prod, sizes.values())), _range(sizes.values(), storage)
    budget = {float(FEW): least, float(MANY): most}.get(bits, bits * weights)
    if not least - _TOLERANCE * weights <= budget <= most + _TOLERANCE * weights:
        raise ValueError(
            f"bits: expected 3, 4, or {least / weights:.3f} to {most / weights:.3f} stored bits a weight, scales "
            f"included, got {bits}{_way_out(bits, sizes.values(), storage)}"
        )
    if expert_scores is not None and scores is not None and scores.parts:
        raise ValueError(f"expert_scores: expected none with scores of granularity {scores.granularity}, got some")
    values = [0.0] * len(stack) if scores is None else scores.values
    units = Units(stack, layers, expert_scores)
    parts = scores is not None and bool(scores.parts)
    groups = units.parts(ranked(scores)) if scores is not None and parts else units.groups(values)
    many, spent = within_budget(units, groups, budget - least, storage, whole=parts)
    return BitPlan(units.bits(many), sizes, (least + spent) / weights, left)


def plan_by(stack: DecoderLayers, config: OwlBnbConfig) -> BitPlan:
    """The plan of a config: by its modules, else its allocation, else its bits and scores.

    Args:
        stack: the layers, restricted to the matrices that the config includes and does not exclude.
        config: of the quantized model.

    Raises:
        ValueError: see `plan_bits` and `plan_of`; an allocation of another kind, or for another model.
    """
    if config.modules:
        return plan_of(stack, config.modules, config)
    if config.allocation is None:
        return plan_bits(stack, config.bits, config, config.scores, config.skip, expert_scores=config.expert_scores)
    kind, values = config.allocation.kind, config.allocation.values
    if kind != "bits" or len(values) != len(stack):
        raise ValueError(
            f"allocation: expected bits of {len(stack)} layers, got {kind} of {len(values)}; hf_cod.allocate(scores, "
            '"bits", ...) makes one'
        )
    check_sizes("allocation", config.allocation.model, config.allocation.sizes, stack)
    layers, _ = quantizable(stack, config, config.skip)
    if config.allocation.modules:
        return plan_of(stack, _widths(config, [name for layer in layers for name in layer]), config)
    if config.expert_scores is not None:
        config.expert_scores.check(stack)
    units = Units(stack, layers, config.expert_scores)
    many = {
        unit for index, value in enumerate(values) for unit in within_mean(units, units.of_layer(index), value, config)
    }
    return plan_of(stack, units.bits(many), config)


def _widths(config: OwlBnbConfig, names: Sequence[str]) -> dict[str, Width]:
    """The bits of these matrices in an allocation to matrices."""
    assert config.allocation is not None
    if config.expert_scores is not None:
        got = config.allocation.granularity
        raise ValueError(f"expert_scores: expected none with an allocation of granularity {got}, got some")
    modules, known = config.allocation.modules, {*names}
    given = {own: value for name, value in modules.items() for own in stored_names(name, known)}
    for name in names:
        if name not in given:
            raise ValueError(f"allocation: expected bits of each matrix, got none for {name}")
        if given[name] not in BITS:
            raise ValueError(f"bits: expected 3 or 4, got {given[name]:g} for {name}")
    return {name: int(given[name]) for name in names}


def as_allocation(
    stack: DecoderLayers,
    plan: BitPlan,
    storage: StorageSettings,
    method: str = "uniform",
    granularity: str = "layer",
) -> LayerAllocation:
    """The bits of each layer, which can be saved and used as `OwlBnbConfig.allocation`: the mean over its matrices,
    which lies between 3 and 4 in a layer of both widths.

    Args:
        stack: the layers, whose matrices are still dense.
        plan: for them.
        storage: how codes and scales are stored.
        method: the score by which bits were distributed.
        granularity: of the plan; the allocation has the bits of each matrix unless it is "layer".
    """
    values, parameters = [], []
    for index in range(len(stack)):
        names = plan.names(stack, index)
        codes = sum(count_codes(plan.sizes[name], storage) for name in names)
        spent = sum(plan.mean_bits(name) * count_codes(plan.sizes[name], storage) for name in names)
        values.append(spent / codes if names else float(FEW))
        parameters.append(sum(math.prod(plan.sizes[name]) for name in names))
    mean = sum(v * n for v, n in zip(values, parameters, strict=True)) / sum(parameters)
    modules = {} if granularity == "layer" else {name: plan.mean_bits(name) for name in plan.bits}
    made_for = (name_of(stack), sizes_of(stack))
    return LayerAllocation("bits", mean, values, parameters, method, None, *made_for, granularity, modules)


def recorded(config: OwlBnbConfig, plan: BitPlan) -> OwlBnbConfig:
    """A copy of the config for the quantized model: with the resulting bits and modules, and without scores, allocation
    and statistics. The caller's config is not changed and can be used for another model.
    """
    return replace(
        config,
        bits=round(plan.stored, 6),
        modules=plan.bits,
        score=score_of(config),
        scores=None,
        allocation=None,
        statistics=None,
        expert_scores=None,
        include=None,
        exclude=None,
    )


def what_is_lost(config: OwlBnbConfig, plan: BitPlan, calibrated: bool) -> list[str]:
    """Notes on the quality that is lost without scores or without a calibration dataset."""
    told = []
    if score_of(config) is None and not config.modules and len(set(plan.bits.values())) > 1:
        told.append("no scores: earlier layers get 4 bits; with scores from hf-cod score, the choice is better")
    if config.statistics is None and not calibrated:
        told.append(
            "no calibration dataset: scales are set by the largest weight of each block, which costs quality "
            "(SmolLM2-135M in 3 bits: perplexity 124, with statistics 84, with batches and hf_cod.quantize 70)"
        )
    return told


def plan_of(stack: DecoderLayers, bits: Mapping[str, Width], storage: StorageSettings) -> BitPlan:
    """A plan from the bits of each matrix by name.

    Raises:
        ValueError: a name that is not a matrix of the layers, or that cannot be quantized; bits other than 3 and 4, or
            as many as there are no experts.
    """
    layers, left = quantizable(replace(stack, included=stack.included | bits.keys()), storage)
    known = {name: size for layer in layers for name, size in layer.items()}
    for name, width in bits.items():
        if name not in known:
            raise ValueError(f"bits: expected names of the layers' matrices, got {name!r}: {left.get(name, 'unknown')}")
        experts = known[name][0] if len(known[name]) == 3 else 0
        if not is_width(width, experts):
            each = f", or a digit for each of {experts} experts" if experts else ""
            raise ValueError(f"bits: expected 3 or 4{each}, got {width} for {name}")
    sizes = {name: known[name] for name in known if name in bits}
    total = sum(stored_bits(size, bits[name], storage) for name, size in sizes.items())
    return BitPlan({name: bits[name] for name in sizes}, sizes, total / sum(map(math.prod, sizes.values())), left)


def _check_scores(scores: LayerScores, stack: DecoderLayers) -> None:
    if len(scores.values) != len(stack):
        raise ValueError(f"scores: expected {len(stack)} values, one a layer, got {len(scores.values)}")
    for index, weights in enumerate(scores.parameters):
        if weights != stack.count_weights(index):
            raise ValueError(
                f"scores: expected those of a model with {stack.count_weights(index):,} weights in layer {index}, "
                f"got {weights:,} ({scores.model})"
            )


def _range(sizes: Collection[Size], storage: StorageSettings) -> tuple[int, int]:
    """Stored bits with all matrices in 3 bits, and with all in 4."""
    few, many = (sum(stored_bits(size, width, storage) for size in sizes) for width in BITS)
    return few, many


def _way_out(bits: float, sizes: Collection[Size], storage: StorageSettings) -> str:
    """What can be set instead of bits below the range, which padded rows raise: all in 3 bits, or another block."""
    weights, wanted = sum(map(math.prod, sizes)), []
    for block in BLOCKS:
        few, many = _range(sizes, replace(storage, block=block))
        wanted += [block] if few <= bits * weights <= many else []
    padded = any(size[-1] % storage.block for size in sizes)
    if not padded or bits * weights >= _range(sizes, storage)[0]:
        return ""
    other = f", or set block {wanted[0]}, with which {bits} can be reached" if wanted else ""
    return f"; rows are padded to a multiple of block {storage.block}: set bits 3, the smallest size{other}"
