"""`search_plan`: searches for the plan of sparsity or bits by which the compressed model diverges least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics, collect_statistics
from hf_cod.compression.quantization.plan import as_allocation, plan_bits, plan_of
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import stored_bits
from hf_cod.compression.search.evolution import Evolution
from hf_cod.compression.search.plan_probe import PlanProbe
from hf_cod.compression.search.settings import SearchFields, SearchSettings
from hf_cod.compression.search.spaces import Plan, Space, Widths, Zeros
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked
from hf_cod.io.display import say
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, describe_batches, split_samples
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.parts import Part, parts_of
from hf_cod.layers.running import progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation, allocate
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import SPREADS, score_layers
from hf_cod.scoring.settings import CODEBOOK, ScoreSettings

# Scores of the plans from which the search starts: (method, whether it exists for parts of layers).
CANDIDATES = (("owl", True), ("angular", False), ("fisher", True))
UNIFORM = "uniform"


@checked
def search_plan(
    model: nn.Module,
    kind: str | None = None,
    budget: float | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    scores: LayerScores | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: SearchSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[SearchFields],
) -> LayerAllocation:
    """Searches for the plan of least KL divergence between the intact and the compressed language model.

    A score values each part of a model alone; the sum of such values does not predict the loss of the whole. This
    search measures whole plans. It starts from the best of the plans by several scores, the uniform one included, and
    changes it at random, at the same budget (`Evolution`; EvoPress, arXiv 2410.14649). The model is changed in memory
    during the search, and intact afterwards.

    The first half of the samples is for scores and statistics, plans are measured on the second half. The plan looks
    better on these than it is: measure the compressed model on other samples.

    During the search, matrices are pruned by `pruner` with the statistics of the intact model, or rounded to the
    nearest codes with searched scales. All of these are computed once. In addition to the model, memory holds the
    intact matrices, and the ranks of the weights (2 bytes per weight with wanda, 4 with magnitude) or the matrices in 3
    and in 4 bits: at most three copies of the layers.

    Args:
        model: a language model of transformers with plain weights, wrapped or not.
        kind: "sparsity", or "bits" of 3 and 4; default: sparsity.
        budget: mean sparsity; or stored bits per weight, scales included; default: 0.5.
        batches: dicts for the model's forward; `token_batches` makes them from texts. At least two samples.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        scores: of this model; the search then starts from the plans by these and the uniform one. Default: plans by
            owl, angular and fisher for layers, and by owl and fisher for the parts.
        journal: a directory to which the measurements are saved; the same call on the same model resumes from it, with
            the same plan.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: print the cost of the search, and show progress bars.
        settings: what is searched, and how long.
        **fields: or fields of `SearchSettings` by name: `granularity`, what has a value of its own (module, block or
            layer; in plans of bits, matrices that engines fuse share a width), `pruner` (wanda, magnitude), `passes`
            (maximum number of forward passes of one sample), `offspring` (changed plans of a generation), `seed`; for
            texts, also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Returns:
        The plan, for `prune`, `OwlBnbConfig` or `export`. Its `search` holds `start`, the name of the first plan, the
        divergences of the plans `uniform_divergence`, `start_divergence` and `divergence` in nats per token of the
        second half, `passes`, `generations`, `samples` and `bytes` (of memory in addition to the model).

    Raises:
        ValueError: not a language model, layers that depend on each other, weights that cannot be changed in place,
            fewer than two samples, a budget out of range, scores of another model, too few passes for the start, a
            divergence that is not finite.
    """
    chosen = resolve(search_plan, SearchSettings, settings, fields, kind=kind, budget=budget)
    stack = find_decoder_layers(model, layers_path)
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    check_inputs(stack.model, batches)
    if scores is not None:
        scores.check(stack)
    count = describe_batches(batches)["samples"]
    if count < 2:
        raise ValueError(f"batches: expected at least two samples, for scores and for the search, got {count}")
    first, second = split_samples(batches, count // 2)
    space = _space(stack, chosen)  # raises for a budget out of range before anything is measured
    pruner = CODEBOOK if chosen.kind == "bits" else chosen.pruner
    journals = Journals(journal, stack.model, batches)
    work = journals.of("plans", chosen.kind, chosen.granularity, pruner, stack.layers_path)
    title = f"search for a plan of {chosen.kind}"
    with progress(range(chosen.passes), title, show_progress) as bar:
        statistics = None if pruner == "magnitude" else collect_statistics(model, first, layers_path=layers_path)
        probe = PlanProbe(stack, space.names, pruner, statistics, second, work, bar)
        starts = _starts(stack, space, chosen, candidates(model, statistics, first, chosen, scores, layers_path))
        evolution = Evolution(probe, space, chosen.offspring, chosen.seed)
        if show_progress:
            say(cost_of(probe, chosen, len(starts)))
        plan, found = found_plan(evolution, space, starts, chosen.passes)
    found |= {"passes": probe.passes, "samples": len(probe.batches), "bytes": probe.bytes}
    return _allocation(stack, chosen, space.values(plan), found)


def found_plan(
    evolution: Evolution, space: Space, starts: dict[str, Plan], passes: int
) -> tuple[Plan, dict[str, float | str]]:
    """The plan, with the divergences and the number of passes of the search.

    Raises:
        ValueError: too few passes for the plans to start from.
    """
    names = {plan: name for name, plan in reversed(starts.items())}
    every = evolution.samples
    needed = evolution.start_cost(len(names)) + len(every)  # the uniform plan is measured in any case
    if passes < needed:
        raise ValueError(f"passes: expected at least {needed}, those of the plans to start from, got {passes}")
    start = evolution.best_of([*starts.values()])
    uniform, first = evolution.divergences([starts[UNIFORM], start], every)
    if uniform < first:  # it may have been dropped by the few samples
        start, first = starts[UNIFORM], uniform
    plan, generations = evolution.run(start, passes)
    (last,) = evolution.divergences([plan], every)
    return plan, {
        "start": names[start],
        "uniform_divergence": uniform,
        "start_divergence": first,
        "divergence": last,
        "generations": generations,
    }


def cost_of(probe: PlanProbe, chosen: SearchSettings, starts: int) -> str:
    """What the search costs."""
    count = len(probe.batches)
    return (
        f"search: {starts} plans to start from, then generations of {chosen.offspring}, take up to {chosen.passes} "
        f"forward passes of one sample ({chosen.passes / count:.0f} of all {count} samples), and "
        f"{probe.bytes / 2**20:,.0f} MiB in addition to the model"
    )


def _space(stack: DecoderLayers, chosen: SearchSettings) -> Space:
    """The parts of the model, and the budget.

    Raises:
        ValueError: the layers have no matrices that can be changed, or the budget is out of range.
    """
    if chosen.kind == "sparsity":
        sizes = {name: W.numel() for index in range(len(stack)) for name, W in stack.matrices(index)}
        parts = [part for part in parts_of(stack, chosen.granularity) if any(sizes[name] for name in part.names)]
        if not parts:
            raise ValueError("model: expected layers with matrices, got none")
        return Zeros(parts, [sum(sizes[name] for name in part.names) for part in parts], chosen.budget)
    storage = StorageSettings()
    plan = plan_bits(stack, chosen.budget, storage)
    if chosen.budget in BITS:
        raise ValueError(f"budget: expected stored bits between those of 3 and 4, got {chosen.budget:g}")
    known = parts_of(stack, chosen.granularity, fuses=True)
    parts = [Part(part.layer, tuple(name for name in part.names if name in plan.bits)) for part in known]
    parts = [part for part in parts if part.names]

    def price(name: str, bits: int) -> int:
        return stored_bits(plan.sizes[name], bits, storage)

    least = sum(price(name, min(BITS)) for name in plan.bits)
    prices = [sum(price(name, max(BITS)) - price(name, min(BITS)) for name in part.names) for part in parts]
    return Widths(parts, prices, math.floor(chosen.budget * plan.weights) - least)


def candidates(
    model: nn.Module,
    statistics: LayerStatistics | None,
    batches: Sequence[Batch],
    chosen: SearchSettings,
    given: LayerScores | None,
    layers_path: str | None,
) -> list[LayerScores]:
    """The given scores, or those of `CANDIDATES` for layers and for the parts."""
    if given is not None:
        return [given]
    found = []
    for level in dict.fromkeys(("layer", chosen.granularity)):
        for method, in_parts in CANDIDATES:
            if in_parts or level == "layer":
                how = ScoreSettings(method, granularity=level, layers_path=layers_path)
                found.append(score_layers(model, statistics, batches=batches, settings=how))
    return found


def _starts(
    stack: DecoderLayers, space: Space, chosen: SearchSettings, scores: Sequence[LayerScores]
) -> dict[str, Plan]:
    """Name -> plan: the uniform one, and those by the scores."""
    if chosen.kind == "bits":
        # Without scores, earlier layers get four bits.
        found = {UNIFORM: plan_bits(stack, chosen.budget, StorageSettings())}
        for one in scores:
            found[f"{one.method} by {one.granularity}"] = plan_bits(stack, chosen.budget, StorageSettings(), one)
        return {name: space.start(_widths(plan.bits)) for name, plan in found.items()}
    S = chosen.budget
    starts = {UNIFORM: space.start(dict.fromkeys(space.names, S))}
    for one in scores:
        for spread in dict.fromkeys(min(lam, S, 1 - S) for lam in SPREADS):
            plan = allocate(one, "sparsity", S, spread)
            starts[f"{one.method} by {one.granularity}, spread {spread:g}"] = space.start(_sparsities(stack, plan))
    return starts


def _widths(bits: dict[str, Any]) -> dict[str, float]:
    """The bits of matrices; a bank of experts with several counts as three."""
    return {name: float(width if isinstance(width, int) else min(BITS)) for name, width in bits.items()}


def _sparsities(stack: DecoderLayers, plan: LayerAllocation) -> dict[str, float]:
    of_layers = {name: plan.values[i] for i in range(len(stack)) for name in stack.input_shapes(i)}
    return of_layers | plan.modules


def _allocation(
    stack: DecoderLayers, chosen: SearchSettings, values: dict[str, float], found: dict[str, Any]
) -> LayerAllocation:
    """The plan in the form of other plans."""
    if chosen.kind == "bits":
        storage = StorageSettings()
        widths = plan_of(stack, {name: int(bits) for name, bits in values.items()}, storage)
        plan = as_allocation(stack, widths, storage, "search", chosen.granularity)
        return replace(plan, search=found)
    means, counts = [], []
    for index in range(len(stack)):
        sizes = {name: W.numel() for name, W in stack.matrices(index)}
        counts.append(sum(sizes.values()))
        zeros = sum(values.get(name, 0.0) * size for name, size in sizes.items())
        means.append(zeros / counts[-1] if counts[-1] else chosen.budget)
    modules = {} if chosen.granularity == "layer" else values
    made_for = (name_of(stack), sizes_of(stack))
    return LayerAllocation(
        "sparsity", chosen.budget, means, counts, "search", None, *made_for, chosen.granularity, modules, found
    )
