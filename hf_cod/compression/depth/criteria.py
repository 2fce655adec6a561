"""`plan_depth`: decides which layers to remove, by one table of criteria."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hf_cod.analysis.diagnostics.forward_measures import ForwardMeasures
from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric, check_loss
from hf_cod.analysis.evaluation.outputs import task_of_outputs
from hf_cod.compression.depth.depth_plan import GIVEN, MASSIVE, DepthPlan, check_count
from hf_cod.compression.depth.maps import Maps
from hf_cod.compression.depth.protection import protected_layers, unremovable
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.compression.depth.search import LayerSearch
from hf_cod.compression.depth.settings import DepthFields, DepthSettings
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.schema import check_value, limits
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, describe_batches, split_samples
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.independence import NAMED, check_independent
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_calls import check_runs
from hf_cod.layers.removal.drop import check_drop
from hf_cod.layers.removal.refusals import why_refused
from hf_cod.layers.running import progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers

logger = logging.getLogger(__name__)

# Share of the samples that the search does not use, and on which its candidates are compared.
CHOICE_SHARE = 1 / 3


@renamed(path="layers_path", method="criterion", width="search_width")
@checked
def plan_depth(
    model: nn.Module,
    n_removed: int,
    criterion: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: DepthSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[DepthFields],
) -> DepthPlan:
    """Decides which layers to remove. The model is not changed.

    | criterion | removes | `costs` of the plan |
    |---|---|---|
    | search | the layers whose joint removal costs least: greedy, then exchanges; see below | as layer_drop |
    | layer_drop | the layers whose removal alone costs least (arXiv 2502.05795) | loss without l - intact loss |
    | block_influence | the layers of least 1 - E[cos(x^l, x^(l+1))] (ShortGPT, arXiv 2403.03853) | this measure |
    | angular | the n consecutive layers of least d(x^l, x^(l+n)) (Gromov et al., arXiv 2403.17887) | the same, at l |

    Losses are nats a token for language models, else those of the task's own metric (`find_metric`). Layers that `drop`
    refuses are neither measured nor removed; a warning names them.

    The search measures on the first two thirds of the samples. Its exchanges start from the best of the greedy choice
    and the choices of the other criteria. As a search on few tokens overfits to them, all candidates (the results of
    the search and of the other criteria) are compared on the last third, which the search did not use; the one with the
    least loss is chosen. With a `replacement`, candidates are compared with these linear maps (see `drop_layers`),
    because some choices profit more from maps than others. Maps with replacement "measured" are kept or dropped by the
    loss on the same third, which makes losses with them slightly too low.

    Args:
        model: a transformers model, wrapped or not.
        n_removed: the number of layers to remove.
        criterion: see the table; default: search.
        batches: dicts for the model's forward; `token_batches` makes them from texts. The search requires at least two
            samples, and dozens are better.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which the search saves its measurements; the same call on the same model resumes from
            it. Searches for other numbers of layers can share it.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show progress bars.
        settings: how layers are selected and candidates are compared.
        **fields: or fields of `DepthSettings` by name: `protect` (True: never remove layers in which massive
            activations arise, see `massive_layers`; False: no protection; or the index or indices of the layers to
            keep), `replacement` (the replacement with which candidates of the search are compared, fitted to the first
            two thirds; default: none), `search_width` (number of layers that each step of the search tries); for
            texts, also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: an unknown criterion or replacement, fewer unprotected layers than `n_removed`, too few samples,
            layers that share keys and values, a result that the config cannot describe (see `drop`), NaN or infinity in
            activations (says where).
    """
    how = resolve(plan_depth, DepthSettings, settings, fields, criterion=criterion)
    stack = find_decoder_layers(model, layers_path)
    check_count(n_removed, len(stack), "n_removed")
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    check_inputs(stack.model, batches)
    check_independent(stack, "layers", batches, NAMED)
    forward = measure_forward(model, batches, layers_path=layers_path, show_progress=show_progress)
    check_runs(stack, forward.runs)
    protected = protected_layers(stack, how.protect, forward)
    journals = Journals(journal, stack.model, batches)
    refused = unremovable(stack, n_removed, protected)
    free = [i for i in range(len(stack)) if i not in {*protected, *refused}]
    request = _Request(stack, n_removed, free, refused, batches, forward, journals, how, show_progress)
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
        metric="loss" if metric == "perplexity" else metric,  # the search uses the logarithm of the perplexity
    )


@dataclass(frozen=True)
class _Request:
    """The inputs of a criterion."""

    stack: DecoderLayers
    count: int
    free: list[int]
    refused: list[int]
    batches: Sequence[Batch]
    forward: ForwardMeasures
    journals: Journals
    settings: DepthSettings
    show_progress: bool

    @cached_property
    def metric(self) -> Metric:
        """The metric of the model's task."""
        return find_metric(None, task_of_outputs(self.stack, self.batches))

    def probe(self, part: str, batches: Sequence[Batch]) -> RemovalProbe:
        """Measures on a part of the batches."""
        journal = self.journals.of("removals", part, self.stack.layers_path)
        return RemovalProbe(self.stack, self.metric, batches, journal, self.show_progress)

    def least(self, costs: Sequence[float | None]) -> list[int]:
        """The removable layers of least cost."""
        known = {i: cost for i in self.free if (cost := costs[i]) is not None}
        return sorted(sorted(known, key=lambda i: (known[i], i))[: self.count])


@dataclass(frozen=True)
class _Found:
    """The result of a criterion; for the fields see `DepthPlan`."""

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
    """Excludes blocks with a protected layer: the block of least angle contained one (perplexity 381 instead of 90)."""
    n = request.count
    distances = request.forward.angular_distance()[:, n - 1].tolist()
    costs = [None if math.isnan(distance) else distance for distance in distances]
    blocks = {
        cost: [*range(start, start + n)]
        for start, cost in reversed([*enumerate(costs)])
        if cost is not None and all(i in request.free for i in range(start, start + n))
    }
    if not blocks:
        raise ValueError(
            f"n_removed: expected at most the longest run of unprotected layers, got {n}; protect=False removes the "
            "protection, and other criteria do not require consecutive layers"
        )
    return _Found(_first_removable(request, (blocks[cost] for cost in sorted(blocks))), costs)


def _search(request: _Request) -> _Found:
    samples = describe_batches(request.batches)["samples"]
    if samples < 2:
        raise ValueError(
            f"batches: expected at least two samples, one for the search and one to compare candidates, got {samples}"
        )
    seen, unseen = split_samples(request.batches, samples - max(1, round(samples * CHOICE_SHARE)))
    probe = request.probe("search", seen)
    costs = _single_costs(request, probe)
    known = {i: cost for i in request.free if (cost := costs[i]) is not None}
    search = LayerSearch(probe, known, request.settings.search_width)
    candidates = {"layer_drop": request.least(costs), "greedy": search.greedy(request.count)}
    candidates["block_influence"] = _block_influence(request).layers
    with suppress(ValueError):  # if each block contains a protected layer
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
    """For each candidate, the loss with its layers replaced by maps, and the number of maps; maps are then undone."""
    stack = request.stack
    journal = request.journals.of("losses with maps", request.settings.replacement, stack.layers_path)
    for layers in progress(candidates, "choice with maps", request.show_progress):
        if journal.is_sound(str(layers), partial(_check_loss, metric=request.metric, most_maps=len(layers))):
            continue
        maps = Maps()
        try:
            maps.put(stack, layers, seen, unseen if request.settings.replacement == "measured" else None)
            (loss,) = RemovalProbe(stack, request.metric, unseen).losses([layers])
        finally:
            maps.take_back()
        journal.add(str(layers), [loss, sum(entry["used"] for entry in maps.replacements)])
    return [(loss, count) for loss, count in (journal.result(str(layers), tuple[float, int]) for layers in candidates)]


def _check_loss(value: Any, metric: Metric, most_maps: int) -> None:
    """Checks a loss and a number of maps from a journal."""
    loss, maps = check_value(value, tuple[float, int], "loss with maps")
    check_loss(metric, loss)
    check_value(maps, int, "maps", limits(least=0, most=most_maps))


def _choose(request: _Request, told: dict[str, dict[str, Any]], costs: list[float | None]) -> _Found:
    """The candidate with the least loss on samples that the search did not use, of those that can be dropped."""
    # Of candidates with equal losses the last one: exchanges come before their start.
    ordered = sorted(reversed([*told]), key=lambda name: told[name]["loss"])
    layers = _first_removable(request, (told[name]["layers"] for name in ordered if name != "intact"))
    return _Found(layers, costs, told)


def _first_removable(request: _Request, ordered: Iterable[list[int]]) -> list[int]:
    """The first of these sets of layers that `drop` can remove; a warning names each one before it."""
    refused: dict[tuple[int, ...], str] = {}
    for layers in ordered:
        if tuple(layers) in refused:
            continue
        why = why_refused(request.stack, layers)
        if why is None:
            return layers
        logger.warning("layers %s are not removed together: %s", ", ".join(map(str, layers)), why)
        refused[tuple(layers)] = why
    raise ValueError(next(iter(refused.values())))


def _single_costs(request: _Request, probe: RemovalProbe) -> list[float | None]:
    """The increase of the loss by the removal of each single layer; None for those that cannot be removed."""
    measured = [i for i in range(len(request.stack)) if i not in request.refused]
    intact, *without = probe.losses([(), *((i,) for i in measured)], "single layers")
    costs = {i: loss - intact for i, loss in zip(measured, without, strict=True)}
    return [costs.get(i) for i in range(len(request.stack))]


# Criterion -> its function; `settings.CRITERIA` describes each.
CRITERIA: dict[str, Callable[[_Request], _Found]] = {
    "search": _search,
    "layer_drop": _layer_drop,
    "block_influence": _block_influence,
    "angular": _angular,
}
