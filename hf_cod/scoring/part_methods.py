"""The scoring methods of parts of layers: blocks, or single matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_cod.analysis.statistics.output_gradients import measure_loss_weights
from hf_cod.functional import outliers
from hf_cod.functional.bits import BITS
from hf_cod.io.text import split_samples
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.parts import Part, parts_of
from hf_cod.scoring.divergence_probe import DivergenceProbe
from hf_cod.scoring.layer_scores import PartScore, mean_score
from hf_cod.scoring.request import PROBE_SAMPLES, TINY, Request, seen_matrices, statistics_of
from hf_cod.scoring.settings import CODEBOOK


def score_parts(request: Request) -> list[PartScore]:
    """The score of each part that the settings ask for.

    Raises:
        ValueError: the layers have no matrices; see the methods.
    """
    stack = request.stack
    # Plans of bits give matrices that engines fuse one width, so that these are measured together.
    fuses = request.settings.method == "kl" and request.settings.pruner == CODEBOOK
    parts = parts_of(stack, request.settings.granularity, fuses)
    if not parts:
        raise ValueError("model: expected layers with matrices, got none")
    counts = {name: W.numel() for index in range(len(stack)) for name, W in stack.matrices(index)}
    values = PART_METHODS[request.settings.method](request, parts)
    return [
        PartScore(part.layer, value, {name: counts[name] for name in part.names})
        for part, value in zip(parts, values, strict=True)
    ]


def means_of(method: str, parts: Sequence[PartScore], layers: int) -> list[float]:
    """The mean score of each layer (`mean_score`); of a layer without parts the least of all."""
    least = min(part.value for part in parts)
    found = [[(part.value, part.weights) for part in parts if part.layer == index] for index in range(layers)]
    return [mean_score(method, counts, least) for counts in found]


def _owl(request: Request, parts: Sequence[Part]) -> list[float]:
    """Matrices of experts without tokens have no outliers."""
    statistics = statistics_of(request)
    M, per_module = request.settings.threshold, request.settings.per_module
    values = []
    for part in parts:
        matrices = partial(seen_matrices, request.stack, statistics, part.layer, part.names)
        seen = any(int(statistics.tokens[name].sum()) for name in part.names)
        values.append(outliers.outlier_ratio(matrices, M, per_module) if seen else 0.0)
    return values


def _weight_norm(request: Request, parts: Sequence[Part]) -> list[float]:
    def magnitudes(part: Part) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, W in request.stack.matrices(part.layer):
            if name in part.names:
                yield name, W.flatten(0, -2), torch.ones(W.shape[-1])

    return [outliers.mean_importance(magnitudes(part)) for part in parts]


def _fisher(request: Request, parts: Sequence[Part]) -> list[float]:
    assert request.batches is not None
    costs = measure_loss_weights(request.stack, request.batches, show_progress=request.show_progress)
    return _logarithms(request, parts, [sum(costs.get(name, 0.0) for name in part.names) for part in parts])


def _kl(request: Request, parts: Sequence[Part]) -> list[float]:
    return _logarithms(request, parts, divergences(request, parts))


def _logarithms(request: Request, parts: Sequence[Part], costs: Sequence[float]) -> list[float]:
    """ln of the cost per weight, since the cost of a part grows with its size."""
    sizes = {name: W.numel() for i in range(len(request.stack)) for name, W in request.stack.matrices(i)}
    weights = [max(sum(sizes[name] for name in part.names), 1) for part in parts]
    return [math.log(max(cost / count, TINY)) for cost, count in zip(costs, weights, strict=True)]


def divergences(request: Request, parts: Sequence[Part]) -> list[float]:
    """The divergence of each part alone at the lowest width, or at the target sparsity, in nats per token."""
    assert request.batches is not None
    few, _ = split_samples(request.batches, PROBE_SAMPLES)
    pruner = request.settings.pruner
    statistics = None if pruner == "magnitude" else statistics_of(request)
    probe = DivergenceProbe(request.stack, pruner, statistics, few, request.show_progress)
    journals = Journals(request.journal, request.stack.model, few)
    journal = journals.of("kl", pruner, {} if statistics is None else statistics.digests(), request.stack.layers_path)
    return probe.divergences(parts, min(BITS) if pruner == CODEBOOK else request.settings.target, journal)


def _uniform(request: Request, parts: Sequence[Part]) -> list[float]:
    return [1.0] * len(parts)


def _depth(request: Request, parts: Sequence[Part]) -> list[float]:
    return [float(len(request.stack) - part.layer) for part in parts]


def _random(request: Request, parts: Sequence[Part]) -> list[float]:
    generator = torch.Generator().manual_seed(request.settings.seed)
    return torch.rand(len(parts), generator=generator, dtype=torch.float64).tolist()


# Method -> its function of parts; the methods of `methods.METHODS` that exist for whole layers only are not here.
PART_METHODS: dict[str, Callable[[Request, Sequence[Part]], list[float]]] = {
    "owl": _owl,
    "fisher": _fisher,
    "weight_norm": _weight_norm,
    "kl": _kl,
    "uniform": _uniform,
    "depth": _depth,
    "random": _random,
}
