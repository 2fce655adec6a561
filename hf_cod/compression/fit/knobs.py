"""The table of knobs: compression methods that a plan may combine, in the order of application."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.compression.depth.criteria import plan_depth
from hf_cod.compression.depth.dropper import drop_layers
from hf_cod.compression.experts.dropper import drop_experts
from hf_cod.compression.fit.checks import (
    check_bits,
    check_depth,
    check_experts,
    check_rank,
    check_sparsity,
    check_width,
    has_experts,
    numbers_of_experts,
)
from hf_cod.compression.fit.reach import (
    left_by_bits,
    left_by_depth,
    left_by_experts,
    left_by_share,
    left_by_sparsity,
)
from hf_cod.compression.low_rank.factorizer import factorize
from hf_cod.compression.low_rank.spectra import plan_ranks
from hf_cod.compression.pruning.pruner import prune
from hf_cod.compression.quantization.config import OwlBnbConfig
from hf_cod.compression.quantization.plan import plan_bits
from hf_cod.compression.quantization.quantize import quantize
from hf_cod.compression.sparse.quantizer import pack_sparse
from hf_cod.compression.width.narrower import narrow
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import SampleFields
from hf_cod.io.text import Batches
from hf_cod.layers.removal.experts import mixtures_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import allocate
from hf_cod.scoring.methods import score_layers

# The score by which a budget is distributed over layers, for methods without their own; it takes one forward pass.
SCORE = "angular"
SPREAD = 0.08


@renamed(path="layers_path")
@checked
@dataclass(frozen=True)
class Applying:
    """The inputs for the application of a knob.

    Attributes:
        batches: the calibration batches.
        journal: a directory for finished layers, or None.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show progress bars.
        measured: a directory for measurements of the intact model, which all levels of a knob share; default: the
            journal.
    """

    batches: Batches
    journal: str | Path | None = None
    layers_path: str | None = None
    show_progress: bool = False
    measured: str | Path | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the functions that change the model."""
        return {
            "batches": self.batches,
            "journal": self.journal,
            "layers_path": self.layers_path,
            "show_progress": self.show_progress,
        }

    def measuring(self) -> dict[str, Any]:
        """Keyword arguments for the functions that measure the model."""
        return self.options() | {"journal": self.measured or self.journal}


class ApplyingFields(SampleFields, total=False):
    """Fields of `Applying`, and of samples, that `apply_steps` takes by name."""

    batches: Batches
    journal: str | Path | None
    layers_path: str | None
    show_progress: bool
    measured: str | Path | None


@dataclass(frozen=True)
class Knob:
    """One compression method.

    Attributes:
        levels: (model, layers' module name or None) -> levels that a plan may choose, mildest first.
        tried: the number of measured levels, evenly spaced, the last one included; costs in between are interpolated.
        apply: (model, level, how) -> changes the model in place.
        check: raises ValueError or ImportError if the model, or the installed packages, show that no level can be
            applied. Errors that occur only during the work are raised by `apply`.
        describe: level -> its description.
        left: (layers, level) -> the remaining share of the layers, without rounding to integer ranks, heads, channels
            and blocks.
        structural: whether the number of parameters decreases, as a budget of parameters requires.
        concerns: whether the model has what the method changes; if not, the method is not among the defaults.
    """

    levels: Callable[[nn.Module, str | None], list[float]]
    tried: int
    apply: Callable[[Any, float, Applying], None]
    check: Callable[[DecoderLayers], None]
    describe: Callable[[float], str]
    left: Callable[[DecoderLayers, float], float]
    structural: bool = True
    concerns: Callable[[DecoderLayers], bool] = lambda stack: True


def _shares(*percent: int) -> Callable[[nn.Module, str | None], list[float]]:
    return lambda model, layers_path: [share / 100 for share in percent]


def _depth(model: Any, count: float, how: Applying) -> None:
    plan = plan_depth(model, int(count), replacement="measured", **how.measuring())
    drop_layers(model, plan, "measured", batches=how.batches, layers_path=how.layers_path)


def _experts(model: Any, number: float, how: Applying) -> None:
    count = next(iter(mixtures_of(find_decoder_layers(model, how.layers_path)).values())).count
    drop_experts(
        model, number / count, batches=how.batches, layers_path=how.layers_path, show_progress=how.show_progress
    )


def _width(model: Any, share: float, how: Applying) -> None:
    scores = score_layers(model, method=SCORE, batches=how.batches, layers_path=how.layers_path)
    plan = allocate(scores, "parameter_share", 1 - share, min(SPREAD, share))
    narrow(model, plan, **how.options())


def _low_rank(model: Any, share: float, how: Applying) -> None:
    plan = plan_ranks(model, 1 - share, **how.measuring())
    factorize(model, plan, "whitened", **how.options())


def _sparse(model: Any, share: float, how: Applying) -> None:
    scores = score_layers(model, method=SCORE, batches=how.batches, layers_path=how.layers_path)
    plan = allocate(scores, "sparsity", share, min(SPREAD, 1 - share))
    prune(model, plan, "sparsegpt", **how.options())
    pack_sparse(model)


def _bits(model: Any, codes: float, how: Applying) -> None:
    """Quantizes to `codes` bits a weight, without scales."""
    if codes in BITS:
        quantize(model, OwlBnbConfig(bits=codes), **how.options())
        return
    scores = score_layers(model, method=SCORE, batches=how.batches, layers_path=how.layers_path)
    stack = find_decoder_layers(model, how.layers_path)
    few, many = (plan_bits(stack, bits, OwlBnbConfig()).stored for bits in BITS)
    stored = few + (codes - min(BITS)) / (max(BITS) - min(BITS)) * (many - few)
    quantize(model, OwlBnbConfig(bits=stored, scores=scores), **how.options())


# Knob -> its method. Order matters: methods that remove structure come before sparsity and quantization.
KNOBS: dict[str, Knob] = {
    "depth": Knob(
        lambda model, layers_path: [float(n) for n in range(1, 1 + len(find_decoder_layers(model, layers_path)) // 3)],
        3,
        _depth,
        check_depth,
        lambda x: "1 layer removed" if x == 1 else f"{x:g} layers removed",
        left_by_depth,
    ),
    "experts": Knob(
        numbers_of_experts,
        3,
        _experts,
        check_experts,
        lambda x: "1 expert of each mixture removed" if x == 1 else f"{x:g} experts of each mixture removed",
        left_by_experts,
        concerns=has_experts,
    ),
    "width": Knob(
        _shares(*range(4, 42, 2)),
        3,
        _width,
        check_width,
        lambda x: f"{x:.0%} of the weights removed by heads and channels",
        left_by_share,
    ),
    "rank": Knob(
        _shares(*range(5, 51)),
        4,
        _low_rank,
        check_rank,
        lambda x: f"{x:.0%} of the weights removed by low rank",
        left_by_share,
    ),
    "sparsity": Knob(
        _shares(*range(50, 85, 5)),
        3,
        _sparse,
        check_sparsity,
        lambda x: f"{x:.0%} of the weights zero and packed",
        left_by_sparsity,
        structural=False,
    ),
    "bits": Knob(
        lambda model, layers_path: [4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3, 3.2, 3.1, 3.0],
        3,
        _bits,
        check_bits,
        lambda x: f"{x:g} bits a weight, plus scales",
        left_by_bits,
        structural=False,
    ),
}
# A matrix is stored packed or in few bits, not both.
EXCLUSIVE = (("sparsity", "bits"),)
# Rows of packed factors are padded by their rank, so that the size of both together does not follow from that of each.
EXCLUSIVE_OF_BANKS = (*EXCLUSIVE, ("rank", "bits"))
# Methods that remove structure, also of matrices that keep their form (`fixed_share`).
REMOVING = ("depth", "experts", "width")
# Errors of methods that do not support the model or miss a package, and of trials with a loss that is not finite.
# RuntimeError: torch's, if a decomposition fails, memory is exhausted, or an operation has no kernel.
FAILURES = (ValueError, ImportError, RuntimeError)


def exclusive(stack: DecoderLayers) -> Sequence[tuple[str, str]]:
    """Pairs of knobs of which a plan has at most one."""
    return EXCLUSIVE_OF_BANKS if any(stack.expert_matrices(index) for index in range(len(stack))) else EXCLUSIVE


def describe_steps(steps: dict[str, float]) -> str:
    """The description of all steps."""
    return "; ".join(KNOBS[knob].describe(level) for knob, level in steps.items()) or "nothing"


def chosen_knobs(knobs: Sequence[str] | None, kind: str) -> list[str]:
    """The named knobs, or all, that can meet a budget of this kind, in the order of the table.

    Raises:
        ValueError: an unknown knob, or none left.
    """
    unknown = [knob for knob in knobs or () if knob not in KNOBS]
    if unknown:
        raise ValueError(f"knobs: expected some of {', '.join(KNOBS)}, got {unknown[0]!r}")
    chosen = [knob for knob in KNOBS if knobs is None or knob in knobs]
    if kind == "parameter_share":
        chosen = [knob for knob in chosen if KNOBS[knob].structural]
    if not chosen:
        fewer = ", ".join(knob for knob in KNOBS if KNOBS[knob].structural)
        got = ", ".join(knobs or ()) or "none"
        raise ValueError(f"knobs: expected at least one that reduces the number of parameters ({fewer}), got {got}")
    return chosen


def left_out(knobs: Sequence[str], stack: DecoderLayers, named: bool) -> dict[str, str]:
    """Knob -> a note on why it cannot be applied to the model; raises the error instead if knobs were named."""
    why: dict[str, str] = {}
    for knob in knobs:
        try:
            KNOBS[knob].check(stack)
        except FAILURES as error:
            if named:
                raise
            why[knob] = f"{knob} is left out: {error}"
    return why
