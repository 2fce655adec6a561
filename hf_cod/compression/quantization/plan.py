"""Bit plans: which matrices get four bits within a budget of stored bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.quantization.config import OwlBnbConfig, score_of
from hf_cod.compression.quantization.format import stored_columns
from hf_cod.compression.quantization.scales import NESTED_BLOCK
from hf_cod.compression.quantization.settings import StorageFields, StorageSettings
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.module_names import ModuleSettings, Names
from hf_cod.io.settings import resolve
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.orientation import is_plain, shape_of
from hf_cod.layers.sensitive_modules import sensitive_modules
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores

FEW, MANY = min(BITS), max(BITS)
# Tolerance for a budget that the user rounded, in bits a weight.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class BitPlan:
    """Bits of each matrix.

    Attributes:
        bits: name -> 3 or 4, in the order of the model.
        sizes: name -> (out, in).
        stored: stored bits a weight, scales included, over all of these matrices.
        left: name -> the reason why a matrix of the layers is not quantized.
    """

    bits: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    stored: float
    left: dict[str, str]


def stored_bits(size: tuple[int, int], bits: int, storage: StorageSettings) -> int:
    """The number of bits of a matrix (out, in) in a file: codes, scales, and the scales of scales."""
    weights = _codes(size, storage)
    count = weights // storage.block
    nested = (count + NESTED_BLOCK - 1) // NESTED_BLOCK
    return weights * bits + (8 * count + 32 * (nested + 1) if storage.double_quant else 32 * count)


def quantizable(
    stack: DecoderLayers, storage: StorageSettings, skip: Sequence[str] = ()
) -> tuple[list[dict[str, tuple[int, int]]], dict[str, str]]:
    """Name -> (out, in) of the quantizable matrices of each layer; and name -> the reason, for all other matrices that
    `stack` lists. Routers, gates and latent projections are quantizable if `stack` includes them by name.
    """
    layers: list[dict[str, tuple[int, int]]] = []
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
            left[matrix.bank] = f"experts in one {matrix.parameter.dim()}-D parameter"
    return layers, left


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
    **fields: Unpack[StorageFields],
) -> BitPlan:
    """Gives four bits to the layers with the highest scores, as far as the budget of stored bits allows.

    Of layers with equal scores, the earlier one comes first; without scores all are equal. In the layer at which the
    budget is exhausted, some matrices get four bits, in the order of the model. The stored size therefore meets the
    budget within the size of one matrix.

    Args:
        model: a transformers model, or its layers; it is not changed.
        bits: stored bits a weight, scales included; 3 or 4 means the same width for all.
        settings: how codes and scales are stored.
        scores: of this model, from `score_layers`.
        skip: parts of module names; matching matrices are not quantized.
        include, exclude: the matrices to quantize, as PEFT's target_modules and exclude_modules. Routers, gates of one
            row and latent projections are quantized only if `include` matches them.
        layers_path: module name of the layer stack, if it cannot be found automatically.
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
        raise ValueError(f"model: expected a Linear in the layers that can be quantized, got none: {left}")
    if scores is not None:
        _check_scores(scores, stack)
    weights = sum(n * k for n, k in sizes.values())
    least, most = (sum(stored_bits(size, width, storage) for size in sizes.values()) for width in BITS)
    ends: dict[float, float] = {FEW: least, MANY: most}
    budget = ends.get(bits, bits * weights)
    if not least - _TOLERANCE * weights <= budget <= most + _TOLERANCE * weights:
        raise ValueError(
            f"bits: expected 3, 4, or {least / weights:.3f} to {most / weights:.3f} stored bits a weight, scales "
            f"included, got {bits}"
        )
    values = [0.0] * len(stack) if scores is None else scores.values
    chosen = dict.fromkeys(sizes, FEW)
    spent = least
    for index in sorted(range(len(stack)), key=lambda i: -values[i]):
        whole = True
        for name, size in layers[index].items():
            more = stored_bits(size, MANY, storage) - stored_bits(size, FEW, storage)
            if spent + more <= budget:
                chosen[name], spent = MANY, spent + more
            else:
                whole = False
        if not whole:
            break
    return BitPlan(chosen, sizes, spent / weights, left)


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
        return plan_bits(stack, config.bits, config, config.scores, config.skip)
    kind, values = config.allocation.kind, config.allocation.values
    if kind != "bits" or len(values) != len(stack):
        raise ValueError(
            f"allocation: expected bits of {len(stack)} layers, got {kind} of {len(values)}; hf_cod.allocate(scores, "
            '"bits", ...) makes one'
        )
    check_sizes("allocation", config.allocation.model, config.allocation.sizes, stack)
    layers, _ = quantizable(stack, config, config.skip)
    bits = {n: v for value, sizes in zip(values, layers, strict=True) for n, v in _within(sizes, value, config).items()}
    return plan_of(stack, bits, config)


def as_allocation(
    stack: DecoderLayers, plan: BitPlan, storage: StorageSettings, method: str = "uniform"
) -> LayerAllocation:
    """The bits of each layer, which can be saved and used as `OwlBnbConfig.allocation`: the mean over its matrices,
    which lies between 3 and 4 in a layer of both widths.

    Args:
        stack: the layers, whose matrices are still dense.
        plan: for them.
        storage: how codes and scales are stored.
        method: the score by which bits were distributed.
    """
    values, parameters = [], []
    for index in range(len(stack)):
        names = [name for name in stack.linears(index) if name in plan.bits]
        codes = {name: _codes(plan.sizes[name], storage) for name in names}
        spent = sum(plan.bits[name] * codes[name] for name in names)
        values.append(spent / sum(codes.values()) if names else float(FEW))
        parameters.append(sum(plan.sizes[name][0] * plan.sizes[name][1] for name in names))
    mean = sum(v * n for v, n in zip(values, parameters, strict=True)) / sum(parameters)
    return LayerAllocation("bits", mean, values, parameters, method, model=name_of(stack), sizes=sizes_of(stack))


def _within(sizes: Mapping[str, tuple[int, int]], value: float, storage: StorageSettings) -> dict[str, float]:
    """Bits of each matrix of a layer; for a value between 3 and 4, matrices get four in model order while they fit."""
    if not FEW < value < MANY:
        return dict.fromkeys(sizes, value)
    codes = {name: _codes(size, storage) for name, size in sizes.items()}
    left = (value - FEW) * sum(codes.values()) + 0.5  # of a code, for rounding
    found: dict[str, float] = {}
    for name, count in codes.items():
        found[name] = MANY if count <= left else FEW
        left -= count if found[name] == MANY else 0
    return found


def _codes(size: tuple[int, int], storage: StorageSettings) -> int:
    """The number of stored codes of a matrix (out, in), which is the cost in bits of one bit more per code."""
    return size[0] * stored_columns(size[1], storage.block)


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


def plan_of(stack: DecoderLayers, bits: Mapping[str, float], storage: StorageSettings) -> BitPlan:
    """A plan from the bits of each matrix by name.

    Raises:
        ValueError: a name that is not a matrix of the layers, or that cannot be quantized; bits other than 3 and 4.
    """
    layers, left = quantizable(replace(stack, included=stack.included | bits.keys()), storage)
    known = {name: size for layer in layers for name, size in layer.items()}
    for name, width in bits.items():
        if name not in known:
            raise ValueError(f"bits: expected names of the layers' matrices, got {name!r}: {left.get(name, 'unknown')}")
        if width not in BITS:
            raise ValueError(f"bits: expected 3 or 4, got {width} for {name}")
    sizes = {name: known[name] for name in known if name in bits}
    total = sum(stored_bits(size, int(bits[name]), storage) for name, size in sizes.items())
    return BitPlan(
        {name: int(bits[name]) for name in sizes}, sizes, total / sum(n * k for n, k in sizes.values()), left
    )


def _check_scores(scores: LayerScores, stack: DecoderLayers) -> None:
    if len(scores.values) != len(stack):
        raise ValueError(f"scores: expected {len(stack)} values, one a layer, got {len(scores.values)}")
    for index, weights in enumerate(scores.parameters):
        if weights != stack.count_weights(index):
            raise ValueError(
                f"scores: expected those of a model with {stack.count_weights(index):,} weights in layer {index}, "
                f"got {weights:,} ({scores.model})"
            )


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
