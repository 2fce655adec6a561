"""ExportPlan: the width of each matrix in the format of an engine, within a budget of stored bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hf_cod.compression.export.settings import GROUPS
from hf_cod.compression.quantization.plan import BitPlan
from hf_cod.compression.quantization.quantizable import quantizable
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import Width
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.orientation import is_transposed
from hf_cod.layers.parts import units_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores

Size = tuple[int, int]
"""(out, in) of a matrix."""

# Bits from which on a matrix is not quantized.
UNQUANTIZED = 16
# Tolerance for a budget that the user rounded, in bits a weight.
_TOLERANCE = 0.02


class Format(Protocol):
    """What a plan must know of an engine; `targets.Target` has it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The nominal bits that it has, rising."""

    @property
    def fuses(self) -> bool:
        """Whether matrices with the same input must have one width."""

    def stored(self, size: Size, width: int, group: int | None, scale_bits: int) -> int:
        """The number of bits of a matrix in a file, scales included."""

    def grid(self, size: Size, width: int) -> int:
        """The bits of the uniform grid that stands for its rounding, in a search."""

    def reason(self, size: Size, group: int | None) -> str | None:
        """Why a matrix of this size cannot be quantized; None if it can."""


@dataclass(frozen=True)
class ExportPlan:
    """Widths of the matrices of a model in the format of an engine.

    Attributes:
        widths: name -> nominal bits, in the order of the model.
        sizes: name -> (out, in).
        layers: name -> index of its layer.
        stored: name -> bits in a file, scales included.
        left: name -> the reason why a matrix of the layers is not quantized.
        group: number of weights that share a scale; None for a format without a choice.
        method: the score by which widths were distributed, or "given".
    """

    widths: dict[str, int]
    sizes: dict[str, Size]
    layers: dict[str, int]
    stored: dict[str, int]
    left: dict[str, str]
    group: int | None
    method: str

    def bits(self, names: Iterable[str] | None = None) -> float | None:
        """Stored bits a weight, scales included, over some of the matrices or all; None for none."""
        chosen = [*(self.widths if names is None else names)]
        weights = sum(self.sizes[name][0] * self.sizes[name][1] for name in chosen)
        return sum(self.stored[name] for name in chosen) / weights if weights else None

    @property
    def weights(self) -> int:
        """The number of weights of these matrices."""
        return sum(n * k for n, k in self.sizes.values())


@dataclass(frozen=True)
class Matrices:
    """The matrices that an engine can quantize: names by layer and unit, a unit being those that share a width."""

    units: list[list[list[str]]]
    sizes: dict[str, Size]
    left: dict[str, str]
    group: int | None
    scale_bits: int


def matrices_of(stack: DecoderLayers, engine: Format, group: int | None, grouped: bool) -> Matrices:
    """The matrices of the layers that an engine can quantize.

    Args:
        stack: the layers, restricted to the chosen matrices.
        engine: the format.
        group: number of weights that share a scale; None: the largest of `GROUPS` that divides all rows.
        grouped: whether the format has a choice of groups.

    Raises:
        ValueError: there is no such matrix, or a group size for a format without.
    """
    if not grouped and group is not None:
        raise ValueError(f"group_size: expected none for {engine.name}, whose types have their own, got {group}")
    layers, left = quantizable(stack, StorageSettings())
    sizes: dict[str, Size] = {}
    for index, names in enumerate(layers):
        linears = stack.linears(index)
        for name, size in names.items():
            if name not in linears or (engine.fuses and is_transposed(linears[name])):
                left[name] = "experts in one parameter" if name not in linears else "a Conv1D, which is not a Linear"
            else:
                sizes[name] = (size[0], size[1])
    if grouped and group is None:
        whole = [g for g in GROUPS if all(k % g == 0 for _, k in sizes.values() if k % GROUPS[-1] == 0)]
        group = whole[0] if whole else GROUPS[-1]
    reasons = {name: engine.reason(size, group) for name, size in sizes.items()}
    left |= {name: reason for name, reason in reasons.items() if reason is not None}
    sizes = {name: size for name, size in sizes.items() if reasons[name] is None}
    if not sizes:
        kinds = "; ".join(dict.fromkeys(left.values())) or "the layers have no Linear"
        raise ValueError(f"model: expected matrices that {engine.name} can quantize, got none: {kinds}")
    units = [units_of([n for n in stack.linears(i) if n in sizes], engine.fuses) for i in range(len(stack))]
    weight: Any = stack.model.get_submodule(next(iter(sizes))).weight
    return Matrices(units, sizes, left, group, 8 * weight.dtype.itemsize)


def plan_by_scores(
    stack: DecoderLayers, engine: Format, matrices: Matrices, bits: float, scores: LayerScores | None
) -> ExportPlan:
    """Gives the next larger width of the engine to the layers with the highest scores, as far as the budget allows;
    with scores of blocks or matrices, to the units with the highest scores.

    All matrices get the largest width that fits the budget for all of them. Of layers with equal scores, the earlier
    one comes first; in the layer at which the budget is exhausted, units get more in the order of the model.

    Raises:
        ValueError: the budget is out of range for these matrices, or the scores are of another model.
    """
    if scores is not None:
        scores.check(stack)
    totals = [_total(engine, matrices, dict.fromkeys(matrices.sizes, width)) for width in engine.widths]
    weights = sum(n * k for n, k in matrices.sizes.values())
    budget, slack = bits * weights, _TOLERANCE * weights
    if not totals[0] - slack <= budget <= totals[-1] + slack:
        raise ValueError(
            f"bits: expected {totals[0] / weights:.4g} to {totals[-1] / weights:.4g} stored bits a weight in the "
            f"format of {engine.name}, scales included, got {bits:g}"
        )
    rung = max((i for i, total in enumerate(totals) if total <= budget), default=0)
    low = engine.widths[rung]
    high = next((w for w, total in zip(engine.widths, totals, strict=True) if total > totals[rung]), low)
    widths, spent = dict.fromkeys(matrices.sizes, low), totals[rung]
    units = [(index, unit) for index, layer in enumerate(matrices.units) for unit in layer]
    if scores is not None:
        ranking = scores
        units.sort(key=lambda place: -ranking.value_of(*place))
    for _, unit in units:
        more = sum(_more(engine, matrices, name, low, high) for name in unit)
        if spent + more > budget:
            break
        widths |= dict.fromkeys(unit, high)
        spent += more
    return made_of(engine, matrices, widths, scores.method if scores else "uniform")


def plan_as_given(
    stack: DecoderLayers, engine: Format, matrices: Matrices, plan: LayerAllocation | BitPlan
) -> ExportPlan:
    """The widths of a plan: of each matrix, or of each layer. If a layer has a mean of two widths, units get the larger
    one in the order of the model, as far as the mean allows.

    Raises:
        ValueError: a plan of another kind or for another model, a width that the engine lacks, or matrices that the
            engine fuses with different widths.
    """
    if isinstance(plan, BitPlan):
        widths = _of_matrices(engine, matrices, plan.bits)
    else:
        if plan.kind != "bits":
            raise ValueError(f"plan: expected bits of each layer, got {plan.kind}; allocate(scores, 'bits', ...)")
        if len(plan.values) != len(stack):
            raise ValueError(f"plan: expected bits of {len(stack)} layers, got {len(plan.values)} ({plan.model})")
        check_sizes("plan", plan.model, plan.sizes, stack)
        widths = _of_matrices(engine, matrices, _whole(engine, plan, matrices)) if plan.modules else {}
        for index, value in enumerate(plan.values if not plan.modules else ()):
            widths |= _of_layer(engine, matrices, index, value)
    own = {} if isinstance(plan, BitPlan) else plan.modules
    left = {
        name: f"{own[name]:g} bits in the plan" if name in own else "not in the plan"
        for name in matrices.sizes
        if name not in widths
    }
    sizes = {name: size for name, size in matrices.sizes.items() if name in widths}
    return made_of(engine, replace(matrices, sizes=sizes, left=matrices.left | left), widths, "given")


def _of_matrices(engine: Format, matrices: Matrices, bits: Mapping[str, Width]) -> dict[str, int]:
    for name, width in bits.items():
        if name not in matrices.sizes:
            raise ValueError(f"plan: expected matrices of the model, got {name}: {matrices.left.get(name, 'unknown')}")
        _check_width(engine, int(width), name)
    for unit in (unit for layer in matrices.units for unit in layer):
        found = {bits.get(name) for name in unit}
        if len(found) > 1:
            told = ", ".join(f"{name.rpartition('.')[2]} {bits.get(name, 'none')}" for name in unit)
            raise ValueError(
                f"plan: expected one width for matrices that {engine.name} fuses, got {told} in "
                f"{unit[0].rpartition('.')[0]}"
            )
    return {name: int(bits[name]) for name in matrices.sizes if name in bits}


def _whole(engine: Format, plan: LayerAllocation, matrices: Matrices) -> dict[str, Width]:
    """The bits of the matrices that the engine can quantize and the plan quantizes."""
    found = {n: value for n, value in plan.modules.items() if n in matrices.sizes and value < UNQUANTIZED}
    for name, value in found.items():
        _check_width(engine, value, name)
    return {name: int(value) for name, value in found.items()}


def _of_layer(engine: Format, matrices: Matrices, index: int, value: float) -> dict[str, int]:
    names = [name for unit in matrices.units[index] for name in unit]
    if value == int(value):
        _check_width(engine, int(value), f"layer {index}")
        return dict.fromkeys(names, int(value))
    if not engine.widths[0] < value < engine.widths[-1]:
        _check_width(engine, value, f"layer {index}")
    low = max(width for width in engine.widths if width < value)
    high = min(width for width in engine.widths if width > value)
    counts = {name: n * k for name, (n, k) in matrices.sizes.items()}
    rest = (value - low) / (high - low) * sum(counts[name] for name in names) + 0.5  # of a weight, for rounding
    widths = dict.fromkeys(names, low)
    for unit in matrices.units[index]:
        count = sum(counts[name] for name in unit)
        if count <= rest:
            widths |= dict.fromkeys(unit, high)
            rest -= count
    return widths


def _check_width(engine: Format, width: float, where: str) -> None:
    if width not in engine.widths:
        known = ", ".join(map(str, engine.widths))
        raise ValueError(f"plan: expected widths of {engine.name} ({known} bits), got {width:g} for {where}")


def made_of(engine: Format, matrices: Matrices, widths: dict[str, int], method: str) -> ExportPlan:
    """The plan with these widths."""
    layers = {n: index for index, layer in enumerate(matrices.units) for unit in layer for n in unit if n in widths}
    ordered = {name: widths[name] for name in layers}
    sizes = {name: matrices.sizes[name] for name in layers}
    stored = {name: stored_bits_of(engine, matrices, name, width) for name, width in ordered.items()}
    return ExportPlan(ordered, sizes, layers, stored, matrices.left, matrices.group, method)


def stored_bits_of(engine: Format, matrices: Matrices, name: str, width: int) -> int:
    """The number of bits of a matrix in a file, scales included."""
    return engine.stored(matrices.sizes[name], width, matrices.group, matrices.scale_bits)


def _total(engine: Format, matrices: Matrices, widths: Mapping[str, int]) -> int:
    return sum(stored_bits_of(engine, matrices, name, width) for name, width in widths.items())


def _more(engine: Format, matrices: Matrices, name: str, low: int, high: int) -> int:
    return stored_bits_of(engine, matrices, name, high) - stored_bits_of(engine, matrices, name, low)
