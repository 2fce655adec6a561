"""Which layers to remove: one table of criteria."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hf_cod.analysis.diagnostics.forward_pass import ForwardMeasures, measure_forward
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.compression.depth.depth_plan import GIVEN, MASSIVE, DepthPlan, check_count
from hf_cod.compression.depth.maps import Maps
from hf_cod.compression.depth.protection import massive_layers, removable
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.compression.depth.search import LayerSearch
from hf_cod.compression.depth.settings import DepthFields, DepthSettings
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batch, Batches, describe_batches, split_samples
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import check_independent
from hf_cod.layers.removal import check_drop
from hf_cod.layers.running import progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import task_of

# Share of the samples that a search does not see, to choose on between what it ends with.
CHOICE_SHARE = 1 / 3


@renamed(path="layers_path", method="criterion", width="search_width")
@checked
def plan_depth(
    model: nn.Module,
    n_removed: int,
    criterion: str | None = None,
    *,
    batches: Batches,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: DepthSettings | None = None,
    **fields: Unpack[DepthFields],
) -> DepthPlan:
    """Decides which layers to remove. The model is left as it was.

    | criterion | removes | costs |
    |---|---|---|
    | search | what the whole remaining model misses least: greedy, then exchanges; see below | as layer_drop |
    | layer_drop | the layers whose removal alone costs least (arXiv 2502.05795) | loss without l - intact loss |
    | block_influence | the layers with the least 1 - E[cos(x^l, x^(l+1))] (ShortGPT, arXiv 2403.03853) | that |
    | angular | the n consecutive layers with the least d(x^l, x^(l+n)) (Gromov et al., arXiv 2403.17887) | that, at l |

    Losses are nats a token of language models, else those of the task's own metric (`find_metric`).

    The search measures on the first two thirds of the samples and starts from the best of its greedy choice and the
    other criteria's. A search over few tokens fits them: so what it ended with, and what the other criteria say, meet
    on the last third, which the search did not see, and the least loss there decides: with the replacements that are to
    stand in the place of the layers (see `drop_layers`), as some choices leave more for a map to do than others. Maps
    that are to be "measured" are kept by the loss on that third, too, so that losses with them are a little too good.

    Args:
        model: a transformers model, wrapped or not.
        n_removed: how many layers go.
        criterion: see the table; default: search.
        batches: dicts for the model's forward; for the search two samples at least, better dozens.
        journal: a directory: what the search measures goes there as it comes, and the same call on the same model goes
            on where it stopped. Searches for other numbers of layers share it.
        layers_path: the stack's module name where it cannot be found.
        show_progress: show progress bars.
        settings: which layers go, and by what the choices are compared.
        **fields: or fields of `DepthSettings` by name: `protect` (True never removes layers where massive activations
            arise, `massive_layers`; False lets the criterion decide alone; or the layers that must stay, or one),
            `replacement` (what the candidates of the search are compared with, fitted to the first two thirds; default:
            none), `search_width` (how many layers each step of the search tries).

    Raises:
        ValueError: an unknown criterion or replacement, no such number of layers beside the protected ones, too few
            samples, layers that share keys and values, layers that the config could not describe without (see `drop`),
            NaN or infinity in activations (says where).
    """
    how = resolve(plan_depth, DepthSettings, settings, fields, criterion=criterion)
    stack = find_decoder_layers(model, layers_path)
    check_count(n_removed, len(stack), "n_removed")
    check_independent(stack, "layers")
    check_inputs(stack.model, batches)
    forward = measure_forward(model, batches, layers_path=layers_path, show_progress=show_progress)
    protected = _protected(stack, how.protect, forward)
    journals = Journals(journal, stack.model, batches)
    free = removable(stack, n_removed, protected)
    request = _Request(stack, n_removed, free, batches, forward, journals, how, show_progress)
    found = CRITERIA[how.criterion](request)
    check_drop(model, found.layers, layers_path)
    metric = request.metric.name
    return DepthPlan(
        model=name_of(stack),
        criterion=how.criterion,
        layers=found.layers,
        parameters=sizes_of(stack),
        costs=found.costs,
        protected=protected,
        candidates=found.candidates,
        protection=(MASSIVE if how.protect is True else GIVEN) if protected else "",
        replacement=how.replacement if found.candidates else "none",
        metric="loss" if metric == "perplexity" else metric,  # of which the search takes the logarithm
    )


@dataclass(frozen=True)
class _Request:
    """What a criterion may read."""

    stack: DecoderLayers
    count: int
    free: list[int]
    batches: Sequence[Batch]
    forward: ForwardMeasures
    journals: Journals
    settings: DepthSettings
    show_progress: bool

    @property
    def metric(self) -> Metric:
        """The task's own."""
        return find_metric(None, task_of(self.stack.model, self.batches))

    def probe(self, part: str, batches: Sequence[Batch]) -> RemovalProbe:
        """Measures on a part of the batches."""
        journal = self.journals.of("removals", part, self.stack.layers_path)
        return RemovalProbe(self.stack, self.metric, batches, journal, self.show_progress)

    def least(self, costs: Sequence[float | None]) -> list[int]:
        """The layers that may go and cost least."""
        known = {i: cost for i in self.free if (cost := costs[i]) is not None}
        return sorted(sorted(known, key=lambda i: (known[i], i))[: self.count])


@dataclass(frozen=True)
class _Found:
    """What a criterion says; the fields are those of `DepthPlan`."""

    layers: list[int]
    costs: list[float | None]
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)


def _layer_drop(request: _Request) -> _Found:
    costs = _single_costs(request, request.probe("all", request.batches))
    return _Found(request.least(costs), costs)


def _block_influence(request: _Request) -> _Found:
    costs: list[float | None] = [*request.forward.influence.double().mean(0).tolist()]
    return _Found(request.least(costs), costs)


def _angular(request: _Request) -> _Found:
    """A block must not hold a protected layer: the least angle led straight over one (381 perplexity against 90)."""
    n = request.count
    distances = request.forward.angular_distance()[:, n - 1].tolist()
    costs = [None if math.isnan(distance) else distance for distance in distances]
    starts = {
        cost: start
        for start, cost in reversed([*enumerate(costs)])
        if cost is not None and all(i in request.free for i in range(start, start + n))
    }
    if not starts:
        raise ValueError(
            f"n_removed: expected fewer layers in a row that are not protected, got {n}; protect=False lifts the "
            "protection, the other criteria remove layers from several places"
        )
    start = starts[min(starts)]
    return _Found([*range(start, start + n)], costs)


def _search(request: _Request) -> _Found:
    samples = describe_batches(request.batches)["samples"]
    if samples < 2:
        raise ValueError(
            f"batches: expected at least two samples, to search on one and to choose on one, got {samples}"
        )
    seen, unseen = split_samples(request.batches, samples - max(1, round(samples * CHOICE_SHARE)))
    probe = request.probe("search", seen)
    costs = _single_costs(request, probe)
    known = {i: cost for i in request.free if (cost := costs[i]) is not None}
    search = LayerSearch(probe, known, request.settings.search_width)
    candidates = {"layer_drop": request.least(costs), "greedy": search.greedy(request.count)}
    candidates["block_influence"] = _block_influence(request).layers
    with suppress(ValueError):  # no block may be free of protected layers
        candidates["angular"] = _angular(request).layers
    start = min(zip(probe.losses([*candidates.values()], "candidates"), candidates.values(), strict=True))[1]
    candidates["exchanges"] = search.exchange(start)
    choice = request.probe("choice", unseen)
    if request.settings.replacement == "none":
        intact, *losses = choice.losses([(), *candidates.values()], "choice")
        measured = [(loss, 0) for loss in losses]
    else:
        (intact,) = choice.losses([()], "choice")
        measured = _losses_with_maps(request, [*candidates.values()], seen, unseen)
    told: dict[str, dict[str, Any]] = {"intact": {"layers": [], "loss": intact, "maps": 0}}
    for (name, layers), (loss, maps) in zip(candidates.items(), measured, strict=True):
        told[name] = {"layers": layers, "loss": loss, "maps": maps}
    return _choose(request, told, costs)


def _losses_with_maps(
    request: _Request, candidates: Sequence[list[int]], seen: Sequence[Batch], unseen: Sequence[Batch]
) -> list[tuple[float, int]]:
    """The loss without the layers of each candidate, with maps in their place, which are taken back, and how many."""
    stack, journal = (
        request.stack,
        request.journals.of("losses with maps", request.settings.replacement, request.stack.layers_path),
    )
    for layers in progress(candidates, "choice with maps", request.show_progress):
        if str(layers) in journal:
            continue
        maps = Maps()
        try:
            maps.put(stack, layers, seen, unseen if request.settings.replacement == "measured" else None)
            (loss,) = RemovalProbe(stack, request.metric, unseen).losses([layers])
        finally:
            maps.take_back()
        journal.add(str(layers), [loss, sum(entry["used"] for entry in maps.replacements)])
    return [(loss, count) for loss, count in (journal.result(str(layers), tuple[float, int]) for layers in candidates)]


def _choose(request: _Request, told: dict[str, dict[str, Any]], costs: list[float | None]) -> _Found:
    """The candidate with the least loss on samples that the search did not see, of those that can be dropped."""
    candidates = {name: found["layers"] for name, found in told.items() if name != "intact"}
    refused: ValueError | None = None
    # Of equal ones the last: exchanges go before what they began with.
    for name in sorted(reversed(candidates), key=lambda name: told[name]["loss"]):
        try:
            check_drop(request.stack.model, candidates[name], request.stack.layers_path)
            return _Found(candidates[name], costs, told)
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _single_costs(request: _Request, probe: RemovalProbe) -> list[float | None]:
    """By how much the loss grows without each single layer."""
    intact, *without = probe.losses([(), *((i,) for i in range(len(request.stack)))], "single layers")
    return [loss - intact for loss in without]


# Criterion -> how it decides; `plan_depth` says what each means.
# `settings.CRITERIA` says what each means.
CRITERIA: dict[str, Callable[[_Request], _Found]] = {
    "search": _search,
    "layer_drop": _layer_drop,
    "block_influence": _block_influence,
    "angular": _angular,
}


def _protected(stack: DecoderLayers, protect: bool | int | Iterable[int], forward: ForwardMeasures) -> list[int]:
    if isinstance(protect, bool):
        return massive_layers(forward) if protect else []
    found = [protect] if isinstance(protect, int) else sorted(set(protect))
    wrong = [i for i in found if not 0 <= i < len(stack)]
    if wrong:
        raise ValueError(f"protect: expected True, False or indices from 0 to {len(stack) - 1}, got {wrong}")
    return found
