"""The scoring methods, in one table."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.analysis.diagnostics.gradients import measure_gradient_norm
from hf_cod.analysis.diagnostics.layer_drop import measure_layer_drop
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import as_loss
from hf_cod.analysis.evaluation.outputs import task_of_outputs
from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.analysis.statistics.output_gradients import measure_loss_weights
from hf_cod.functional import budget, outliers
from hf_cod.functional.bits import BITS, SCALE_BITS
from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, check_batches, split_samples
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import check_matrices, name_of, sizes_of
from hf_cod.layers.devices import check_in_memory
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.parts import parts_of
from hf_cod.layers.removal.refusals import why_not_skipped
from hf_cod.layers.running import naming_weights
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.part_methods import divergences, means_of, score_parts
from hf_cod.scoring.pruning_probe import PruningProbe
from hf_cod.scoring.request import PROBE_SAMPLES, TINY, Request, seen_matrices, statistics_of
from hf_cod.scoring.settings import CODEBOOK, OPTIONS, ScoreFields, ScoreSettings
from hf_cod.scoring.settings import METHODS as ROWS

logger = logging.getLogger(__name__)


@checked
def score_layers(
    model: nn.Module,
    statistics: LayerStatistics | None = None,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    show_progress: bool = False,
    settings: ScoreSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[ScoreFields],
) -> LayerScores:
    """Scores each layer of a model.

    | method | score of layer l | needs |
    |---|---|---|
    | owl | D^l, share of outliers among ||X_j||_2 |W_ij| (arXiv 2310.05175) | statistics, or batches |
    | angular | d(x^l, x^(l+1)) at the last token (arXiv 2502.05795) | batches |
    | block_influence | 1 - E[cos(x^l, x^(l+1))] (arXiv 2403.03853) | batches |
    | gradient_norm | ||dL/d theta_l||_2, mean over batches | batches, a head |
    | fisher | ln of the second-order cost, in nats, of losing the outputs of l's matrices | batches, a head |
    | layer_drop | cost of removing l: nats per token for perplexity, else the task's metric | batches |
    | weight_norm | mean of abs(W_ij), the L1 baseline | nothing |
    | sensitivity | slope of the loss by l's sparsity, with all layers at `target` | batches, an LM head |
    | kl | ln of KL(intact || l alone at `target` or in 3 bits), nats per token | batches, an LM head |
    | auto | the score of `CANDIDATES` with the lowest loss of the pruned model | batches, an LM head |
    | uniform | 1 | nothing |
    | depth | L - l: earlier layers matter more, as the Curse of Depth predicts without measuring the model | nothing |
    | random | uniform in [0, 1), from a seed | nothing |

    Args:
        model: a transformers model, wrapped or not; it is not changed.
        statistics: statistics of this model, from `collect_statistics`.
        method: see the table; default: owl, the score of OWL and OwLore, which statistics suffice for. Commands that
            score layers themselves have the default that measured best for what they do: prune angular, narrow auto,
            factorize fisher, quantize owl or angular. This function does not know the purpose of the scores: for
            pruning, pass method="angular" and batches.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which kl saves its measurements; the same call on the same model resumes from it.
        show_progress: show progress bars; kl also prints its cost before it starts.
        settings: how layers are scored.
        **fields: or fields of `ScoreSettings` by name: threshold, per_module, target, pruner, granularity, seed,
            layers_path; one that the method does not use is refused (in `settings` it is ignored); for texts, also
            fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    `sensitivity`, `kl` and `auto` measure on the first `PROBE_SAMPLES` samples. They prune by `pruner` (default: Wanda,
    with the statistics of the intact model), and restore the weights. `auto` builds the allocation of each candidate
    score with each lambda in `SPREADS` and compares the losses of the pruned models. The `settings` of the scores then
    hold the `chosen` score, its `spread` (the default of `allocate`) and the `losses` of all, in nats per token.

    With `granularity` "block" or "module" the parts of layers are scored, for owl, fisher, weight_norm, kl, uniform,
    depth and random, each with the formula of the table for the matrices of the part; costs (fisher, kl) are those per
    weight. With the pruner codebook, kl measures matrices that engines fuse together. The score of a layer is then the
    mean over its parts, weighted by parameters.

    Raises:
        ValueError: an unknown method, a setting of another method, a missing input of the method, texts instead of
            batches, statistics of another model, weights or activations that are not finite (says where).
    """
    chosen = resolve(score_layers, ScoreSettings, settings, fields, method=method)
    method, row = chosen.method, ROWS[chosen.method]
    of_others = {*OPTIONS, *([] if texts is not None else ["seed"])} - {*row.settings}  # texts are cut by the seed
    check_effect(chosen, [name for name in fields if name in of_others], f"method {method}, which does not use it")
    stack = find_decoder_layers(model, chosen.layers_path)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    request = Request(model, stack, statistics, batches, chosen, show_progress, journal)
    if row.needs_batches:
        check_needed(batches, f"for the method {method}")
    check_batches(batches or ())
    if batches:
        check_inputs(stack.model, batches)
    if row.needs_weights:
        check_in_memory(stack.model)
    sizes = sizes_of(stack)
    with naming_weights(stack.model):
        granularity = chosen.granularity if "granularity" in row.settings else "layer"
        values = METHODS[method](request) if granularity == "layer" else []
        parts = [] if granularity == "layer" else score_parts(request)
        used = {key: getattr(chosen, key) for key in row.settings if key != "granularity"} | request.found
        if parts:
            values = means_of(method, parts, len(stack))
        return LayerScores(name_of(stack), method, values, sizes, used, granularity, parts)


def _owl(request: Request) -> list[float]:
    check_matrices(request.stack)
    statistics = statistics_of(request)
    M, per_module = request.settings.threshold, request.settings.per_module
    layers = [partial(seen_matrices, request.stack, statistics, index) for index in range(len(request.stack))]
    return [outliers.outlier_ratio(matrices, M, per_module) for matrices in layers]


def _angular(request: Request) -> list[float]:
    assert request.batches is not None
    measures = measure_forward(request.model, request.batches, ["angular_distance"], **request.options)
    return measures.angular_distance()[:, 0].tolist()


def _block_influence(request: Request) -> list[float]:
    assert request.batches is not None
    measures = measure_forward(request.model, request.batches, ["block_influence"], **request.options)
    return measures.influence.double().mean(0).tolist()


def _gradient_norm(request: Request) -> list[float]:
    assert request.batches is not None
    return measure_gradient_norm(request.model, request.batches, **request.options)


def _fisher(request: Request) -> list[float]:
    """A logarithm, because a layer where massive activations arise costs ten thousand times as much as the others."""
    assert request.batches is not None
    costs = measure_loss_weights(request.stack, request.batches, show_progress=request.show_progress)
    layers = [sum(costs.get(name, 0.0) for name in request.stack.linears(i)) for i in range(len(request.stack))]
    return [math.log(max(cost, TINY)) for cost in layers]


def _layer_drop(request: Request) -> list[float]:
    assert request.batches is not None
    metric = find_metric(None, task_of_outputs(request.stack, request.batches))
    why_not = cache(partial(why_not_skipped, request.stack))
    intact, without = measure_layer_drop(request.model, request.batches, metric, why_not=why_not, **request.options)
    costs = {i: as_loss(metric, each) - as_loss(metric, intact) for i, each in enumerate(without) if each is not None}
    left = [i for i in range(len(without)) if i not in costs]
    if left:
        why = why_not(left[0])
        if not costs:
            raise ValueError(why)
        logger.warning(
            "layer_drop: layers %s get the largest score of the others, as the model does not run without them: %s",
            ", ".join(map(str, left)),
            why,
        )
        request.found["not_removable"] = left
    return [costs.get(i, max(costs.values())) for i in range(len(without))]


def _weight_norm(request: Request) -> list[float]:
    def magnitudes(index: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, W in request.stack.matrices(index):
            yield name, W.flatten(0, -2), torch.ones(W.shape[-1])

    return [outliers.mean_importance(magnitudes(i)) for i in range(len(request.stack))]


def _sensitivity(request: Request) -> list[float]:
    if request.settings.pruner == CODEBOOK:
        return _probe(request).sensitivity(max(BITS), min(BITS), min(BITS))
    S = request.settings.target
    step = min(STEP, S, 1 - S)
    return _probe(request).sensitivity(S - step, S, S + step)


def _kl(request: Request) -> list[float]:
    """A logarithm, as that of fisher."""
    found = {part.layer: part for part in parts_of(request.stack, "layer")}
    costs = dict(zip(found, divergences(request, [*found.values()]), strict=True))
    return [math.log(max(costs.get(index, 0.0), TINY)) for index in range(len(request.stack))]


def _auto(request: Request) -> list[float]:
    """Tries each candidate and lambda, and keeps the best."""
    request = replace(request, statistics=statistics_of(request))
    probe = _probe(request)  # raises for unsupported models before candidates are scored
    found = {method: METHODS[method](request) for method in CANDIDATES}
    tried, plans = [], []
    for method, values in found.items():
        for width, plan in _plans(request, method, values):
            tried.append((method, width))
            plans.append(plan)
    losses = probe.plans(plans)
    method, width = min(zip(losses, tried, strict=True))[1]
    request.found.update(
        chosen=method,
        losses={f"{method} {width:g}": loss for (method, width), loss in zip(tried, losses, strict=True)},
    )
    if request.settings.pruner != CODEBOOK:
        request.found["spread"] = width
    return found[method]


def _plans(request: Request, method: str, values: list[float]) -> Iterator[tuple[float, list[float]]]:
    """(lambda, one value per layer) of each plan that is tried with a score; for bits there is one plan."""
    target = request.settings.target
    sizes = torch.tensor(sizes_of(request.stack)).double()
    if request.settings.pruner == CODEBOOK:
        D = torch.tensor(values if method != "uniform" else _depth(request))  # ties are broken by depth
        wanted = budget.spread(D, sizes, target - SCALE_BITS, min(BITS), max(BITS), falling=False)
        yield 0.0, budget.round_to(wanted, BITS, sizes).tolist()
        return
    for lam in (0.0,) if method == "uniform" else SPREADS:
        width = min(lam, target, 1 - target)
        ends = target - width, target + width
        yield width, budget.spread(torch.tensor(values), sizes, target, *ends, falling=True).tolist()


def _probe(request: Request) -> PruningProbe:
    assert request.batches is not None
    few, _ = split_samples(request.batches, PROBE_SAMPLES)
    pruner = request.settings.pruner
    statistics = None if pruner == "magnitude" else statistics_of(request)
    return PruningProbe(request.stack, pruner, statistics, few, request.show_progress)


def _uniform(request: Request) -> list[float]:
    return [1.0] * len(request.stack)


def _depth(request: Request) -> list[float]:
    return [float(len(request.stack) - index) for index in range(len(request.stack))]


def _random(request: Request) -> list[float]:
    generator = torch.Generator().manual_seed(request.settings.seed)
    return torch.rand(len(request.stack), generator=generator, dtype=torch.float64).tolist()


# Method -> its function; the docstring of `score_layers` has the formulas, `settings.METHODS` what each needs.
METHODS: dict[str, Callable[[Request], list[float]]] = {
    "owl": _owl,
    "angular": _angular,
    "block_influence": _block_influence,
    "gradient_norm": _gradient_norm,
    "fisher": _fisher,
    "layer_drop": _layer_drop,
    "weight_norm": _weight_norm,
    "sensitivity": _sensitivity,
    "kl": _kl,
    "auto": _auto,
    "uniform": _uniform,
    "depth": _depth,
    "random": _random,
}
# Scores and lambdas that auto tries.
CANDIDATES = ("uniform", "owl", "angular", "fisher", "sensitivity")
SPREADS = (0.08, 0.15, 0.25)
# Sensitivity tries each layer at target - STEP and target + STEP.
STEP = 0.1
