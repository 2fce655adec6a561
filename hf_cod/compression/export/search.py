"""A search for the widths of an engine: whole plans, measured by the divergence of the rounded model.

The engine's own rounding is not run; a grid of the same number of values and of the same groups stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.layer_statistics import collect_statistics
from hf_cod.compression.export.plan import ExportPlan, Format, Matrices, made_of, plan_by_scores, stored_bits_of
from hf_cod.compression.export.settings import EMBEDDING_BITS
from hf_cod.compression.search.evolution import Evolution
from hf_cod.compression.search.plan_probe import PlanProbe
from hf_cod.compression.search.planning import UNIFORM, candidates, cost_of, found_plan
from hf_cod.compression.search.settings import SearchSettings
from hf_cod.compression.search.spaces import Rungs
from hf_cod.functional import codebook
from hf_cod.io.display import say
from hf_cod.io.text import Batch, describe_batches, split_samples
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.parts import Part
from hf_cod.layers.running import progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.settings import CODEBOOK

# Widths of the engine that a matrix may have, beside the largest one that fits the budget for all: each costs memory.
BELOW, ABOVE = 1, 2
# Groups of formats without a choice, as far as a grid stands for them.
GROUP = 32
# From this width on, searched scales are the largest ones.
CLIPPED_BELOW = 6


def search_widths(
    stack: DecoderLayers,
    engine: Format,
    matrices: Matrices,
    bits: float,
    batches: Sequence[Batch],
    *,
    scores: LayerScores | None = None,
    passes: int,
    seed: int,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    embedding: int | None = None,
) -> tuple[ExportPlan, dict[str, Any]]:
    """The plan of least divergence that a search finds, and what the search says (`LayerAllocation.search`).

    The first half of the samples is for scores and statistics, plans are measured on the second one. The search starts
    from the best of the plans by scores. The model is intact afterwards.

    With `embedding`, a width, the embedding and the head take part, with one width for both: they start from this one,
    and the budget also holds their size with it. `embedding_bits` of what the search says is the width found.

    Raises:
        ValueError: as `search_plan`; an embedding that the engine cannot quantize.
    """
    count = describe_batches(batches)["samples"]
    if count < 2:
        raise ValueError(f"batches: expected at least two samples, for scores and for the search, got {count}")
    first, second = split_samples(batches, count // 2)
    chosen = SearchSettings("bits", bits, "module", passes=passes, seed=seed)
    uniform = plan_by_scores(stack, engine, matrices, bits, None)  # raises for a budget out of range
    outside = {} if embedding is None else outside_of(stack, engine)
    space = _space(engine, matrices, bits, uniform, outside, embedding)
    kept: list[Any] = ["widths", engine.name, matrices.group, stack.layers_path, *outside]
    work = Journals(journal, stack.model, batches).of(*kept)
    with progress(range(passes), f"search for widths of {engine.name}", show_progress) as bar:
        statistics = collect_statistics(stack.model, first, layers_path=layers_path)
        ladders = {n: own for part, own in zip(space.parts, space.widths, strict=True) for n in part.names}
        rounding = (ladders, partial(on_grid, engine=engine, group=matrices.group))
        probe = PlanProbe(stack, space.names, CODEBOOK, statistics, second, work, bar, rounding, outside)
        plans = {UNIFORM: uniform}
        for one in candidates(stack.model, statistics, first, chosen, scores, layers_path):
            plans[f"{one.method} by {one.granularity}"] = plan_by_scores(stack, engine, matrices, bits, one)
        fixed = dict.fromkeys(outside, float(embedding or 0))
        starts = {name: space.start(fixed | {n: float(w) for n, w in p.widths.items()}) for name, p in plans.items()}
        if show_progress:
            say(cost_of(probe, chosen, len(starts)))
        best, found = found_plan(Evolution(probe, space, chosen.offspring, seed), space, starts, passes)
    widths = {name: int(width) for name, width in space.values(best).items()}
    found |= {"passes": probe.passes, "samples": len(probe.batches), "bytes": probe.bytes}
    found |= {} if embedding is None else {"embedding_bits": max(widths.pop(name) for name in outside)}
    return made_of(engine, matrices, widths, "search"), found


def outside_of(stack: DecoderLayers, engine: Format) -> dict[str, Tensor]:
    """The weights of the embedding and of a head that is not tied to it, by name of the module.

    Raises:
        ValueError: there is none, or the engine cannot quantize one.
    """
    names = {id(module): name for name, module in stack.model.named_modules()}
    found: dict[str, Tensor] = {}
    for module in (stack.embeddings, stack.head):
        weight = getattr(module, "weight", None)
        if weight is None or any(weight is other for other in found.values()):
            continue
        reason = engine.reason((weight.shape[0], weight.shape[1]), None)
        if reason is not None:
            raise ValueError(f"search_embedding: expected an embedding that {engine.name} can quantize, got: {reason}")
        found[names[id(module)]] = weight
    if not found:
        raise ValueError(f"search_embedding: expected an embedding or a head, got {type(stack.model).__name__}")
    return {name: weight.detach() for name, weight in found.items()}


def on_grid(W: Tensor, width: int, squares: Tensor | None, *, engine: Format, group: int | None) -> Tensor:
    """W (out, in) rounded as the engine does it, as far as its type has a grid, with scales weighted by squares."""
    bits = engine.grid((W.shape[0], W.shape[1]), width)
    block = group or GROUP
    missing = -W.shape[1] % block
    high = torch.nn.functional.pad(W.to(torch.promote_types(W.dtype, torch.float32)), (0, missing))
    if squares is None or not squares.any() or bits >= CLIPPED_BELOW:
        s = codebook.largest_scales(high, bits, block, uniform=True)
    else:
        weights = torch.nn.functional.pad(squares.to(W.device), (0, missing))
        s = codebook.search_scales(high, bits, block, weights, uniform=True)
    c = codebook.nearest_codes(high, s, bits, block, uniform=True)
    return codebook.decode(c, s, bits, block, uniform=True)[:, : W.shape[1]].to(W.dtype)


def _space(
    engine: Format,
    matrices: Matrices,
    bits: float,
    uniform: ExportPlan,
    outside: Mapping[str, Tensor],
    embedding: int | None,
) -> Rungs:
    """Parts with the widths around those of the uniform plan; of widths with one size, only the largest. Embedding and
    head are one part, with all widths that they can have.
    """
    places = [engine.widths.index(width) for width in uniform.widths.values()]
    near = engine.widths[max(min(places) - BELOW, 0) : min(places) + ABOVE + 1]
    parts, widths, prices = [], [], []
    for index, layer in enumerate(matrices.units):
        for unit in layer:
            ladder: dict[int, int] = {}
            for width in near:
                ladder[sum(stored_bits_of(engine, matrices, name, width) for name in unit)] = width
            parts.append(Part(index, tuple(unit)))
            widths.append([*ladder.values()])
            prices.append([*ladder])
    budget = math.floor(max(bits * uniform.weights, sum(uniform.stored.values())))
    if embedding is not None:
        sizes = [(weight.shape[0], weight.shape[1]) for weight in outside.values()]
        by_width = {w: sum(engine.stored(size, w, None, 0) for size in sizes) for w in EMBEDDING_BITS}
        own = {price: width for width, price in by_width.items()}
        parts.append(Part(len(matrices.units) - 1, tuple(outside)))
        widths.append([*own.values()])
        prices.append([*own])
        budget += by_width[embedding]
    return Rungs(parts, widths, prices, budget)
