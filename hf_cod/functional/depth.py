"""How much each layer contributes: angular distance, block influence, output variance, effective depth.

Symbols: L layers, counted from 0; x^l the input of layer l, x^(l+1) its output, and x^L the output of the last layer,
before the final norm; S samples, T tokens, d the width. Comments at the end of lines state shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the widest float that its device supports: float64, or float32 on Apple's GPUs."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def angular_distances(x: Tensor) -> Tensor:
    """Angular distance between all pairs of hidden states of one token.

        d(x^l, x^m) = 1/pi * arccos( x^l . x^m / (||x^l|| ||x^m||) )        in [0, 1]

    Curse of Depth (arXiv 2502.05795, angular distance; after Gromov et al., arXiv 2403.17887, eq. 3). Sums are in
    float64; the result for equal states is below 3e-8.

    Args:
        x: (..., L + 1, d) hidden states of one token at each depth.

    Returns:
        (..., L + 1, L + 1), symmetric, zero on the diagonal.
    """
    x = torch.nn.functional.normalize(wide(x), dim=-1, eps=torch.finfo(torch.float32).tiny)
    cosine = (x @ x.mT).clamp(-1, 1)  # (..., L + 1, L + 1)
    distance = cosine.arccos() / math.pi
    return distance - torch.diag_embed(distance.diagonal(dim1=-2, dim2=-1))


def by_layer_and_step(distances: Tensor) -> Tensor:
    """Arranges pair distances as in the paper's Figure 2: column l, step n.

    Args:
        distances: (..., L + 1, L + 1), the result of `angular_distances`.

    Returns:
        (..., L, L): entry [l, n - 1] is d(x^l, x^(l+n)); NaN where l + n > L.
    """
    L = distances.shape[-1] - 1
    l = torch.arange(L, device=distances.device)[:, None]  # noqa: E741 - the paper's letter
    end = l + torch.arange(1, L + 1, device=distances.device)  # (L, L): l + n
    laid_out = distances[..., l.expand(L, L), end.clamp(max=L)]
    return laid_out.masked_fill(end > L, math.nan)


def adjacent(distances: Tensor) -> Tensor:
    """(..., L): d(x^l, x^(l+1)) of each layer, from all pairs (..., L + 1, L + 1)."""
    return distances.diagonal(offset=1, dim1=-2, dim2=-1)


def block_influence(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Block influence of a layer with input x and output y, for each sample.

        BI = 1 - E_t [ x_t . y_t / (||x_t|| ||y_t||) ]

    ShortGPT (Men et al., arXiv 2403.03853, eq. 1). The expectation is over the sample's non-padding tokens.

    Args:
        x, y: (S, T, d), input and output of the layer.
        mask: (S, T), true for tokens that count; None counts all.

    Returns:
        (S,) float32 or wider.
    """
    high = torch.promote_types(x.dtype, torch.float32)
    cosine = torch.nn.functional.cosine_similarity(x.to(high), y.to(high), dim=-1)  # (S, T)
    if mask is None:
        return 1 - cosine.mean(-1)
    return 1 - (cosine * mask).sum(-1) / mask.sum(-1)


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums for mean and variance. Sums of disjoint sets of tokens can be added.

    Args:
        x: (S, T, d).
        mask: (S, T), true for tokens that count; None counts all.

    Returns:
        (4,): count, sum, sum of squares (float64 where the device has it), largest magnitude.
    """
    x = (x if mask is None else x[mask]).flatten()
    w = wide(x)
    return torch.stack([w.new_tensor(w.numel()), w.sum(), w.square().sum(), x.abs().max().to(w)])


def carried(found: dict[int, Tensor], count: int) -> list[Tensor]:
    """The states in order; the output of a layer that did not run is its input."""
    states, current = [], found[min(found)]
    for state in range(count):
        current = found.get(state, current)
        states.append(current)
    return states


def over_runs(runs: list[tuple[set[int], Tensor]], count: int) -> Tensor:
    """Mean distances over the runs through a list of layers, which a model may run through several times.

    The distance between the inputs of layers l and m > l is that of the runs in which layers l to m - 1 run, but for
    those that run in none.

    Args:
        runs: the layers of each run, and the distances (S, L + 1, L + 1) between its states.
        count: L.

    Returns:
        (S, L + 1, L + 1); NaN where no run has all of these layers.
    """
    distances = torch.stack([found for _, found in runs])  # (R, S, L + 1, L + 1)
    if len(runs) == 1:
        return distances[0]
    ever = set().union(*(layers for layers, _ in runs))
    missing = torch.tensor([[layer in ever - layers for layer in range(count)] for layers, _ in runs])  # (R, L)
    before = torch.nn.functional.pad(missing.long().cumsum(-1), (1, 0))  # (R, L + 1)
    whole = (before[:, :, None] == before[:, None, :])[:, None]  # (R, 1, L + 1, L + 1)
    return distances.where(whole, 0).sum(0) / whole.sum(0)


def completed(found: dict[int, Tensor], count: int, counted: bool = False) -> list[Tensor]:
    """One row per layer; a layer that did not run changes nothing. Of rows that begin with a count it stays."""
    if not found:
        return []
    idle = torch.zeros_like(found[min(found)])
    idle[: int(counted)] = found[min(found)][: int(counted)]
    return [found.get(layer, idle) for layer in range(count)]


def effective_depth(contributions: Tensor) -> Tensor:
    """Effective depth: the number of layers that contribute, weighted by how much each of them does.

        D_eff = (sum_l w_l)^2 / sum_l w_l^2 = 1 / sum_l p_l^2,   p_l = w_l / sum_k w_k        in [1, L]

    The participation ratio of the layers' contributions, that is the Hill number of order 2 of their shares p_l (Hill
    1973, "Diversity and evenness"). w_l is what layer l contributes, here its mean angular distance d(x^l, x^(l+1)).
    It is L if all layers turn the hidden state by the same angle, 1 if a single layer contributes, and k if k layers
    contribute equally and the others contribute nothing.

    Args:
        contributions: (..., L), not negative.

    Returns:
        (...). L if all contributions are zero, since no layer differs from the others.
    """
    largest = contributions.amax(-1, keepdim=True)
    w = torch.where(largest > 0, contributions / largest, 1.0)  # so that no square underflows
    return w.sum(-1).square() / w.square().sum(-1)


def angular_resolution(dtype: torch.dtype) -> float:
    """The largest angular distance that rounding to a dtype can cause; smaller distances cannot be resolved.

    Rounding changes each entry of x by at most the share u = eps / 2 of it, so that ||dx|| <= u ||x|| and the angle of
    x changes by at most arcsin(u) / pi. At least 3e-8, the bound of `angular_distances` for equal vectors.

    Args:
        dtype: dtype of the hidden states, a floating point type.
    """
    return max(math.asin(torch.finfo(dtype).eps / 2) / math.pi, 3e-8)


def late_share(contributions: Tensor) -> Tensor:
    """Share of all contributions that comes from the late half of the layers; a middle layer counts half.

    1/2 if early and late layers contribute equally, less if deep layers contribute little (the curse of depth).

    Args:
        contributions: (..., L), not negative.

    Returns:
        (...), in [0, 1]; 1/2 if all contributions are zero.
    """
    L = contributions.shape[-1]
    late = (torch.arange(1, L + 1, device=contributions.device) - L / 2).clamp(0, 1).to(contributions)
    total = contributions.sum(-1)
    return torch.where(total > 0, (contributions * late).sum(-1) / total, 0.5)


def usefulness(intact: float, replaced: Tensor, threshold: float = 0.1) -> float:
    """Share of the layers whose replacement by a linear map raises the loss by more than `threshold` of it.

    Usefulness of arXiv 2603.15389, with its threshold of 10 %.

    Args:
        intact: the loss of the model, above 0.
        replaced: (L,), the loss with each layer replaced.
        threshold: least relative increase of a useful layer.
    """
    return float((replaced > (1 + threshold) * intact).double().mean())


def bootstrap_interval(
    samples: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval (Efron 1979) of `statistic(mean over samples)`.

    Args:
        samples: (S, ...), one entry for each sample.
        statistic: maps (draws, ...) means to (draws, ...) values.
        confidence: probability mass between the two ends.
        draws: number of resamples with replacement.
        seed: seed of the resamples.

    Returns:
        The two ends, each of the shape of one value.
    """
    S = samples.shape[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(S, (draws, S), generator=generator)
    weights = torch.zeros(draws, S, dtype=samples.dtype).scatter_add_(
        1, drawn, torch.ones(draws, S, dtype=samples.dtype)
    )
    means = (weights @ samples.flatten(1) / S).unflatten(1, samples.shape[1:])  # (draws, ...)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(statistic(means), torch.tensor([tail, 1 - tail], dtype=samples.dtype), dim=0)
    return low, high


def sequential_half_width(count: int, looks: int, confidence: float = 0.95) -> float:
    """Half width of an interval for the mean of differences in [-1, 1], valid at each of several looks at the data.

        h = sqrt( 2 ln(2 K / alpha) / n )         (Hoeffding 1963, with alpha / K for each of K looks)

    Args:
        count: n, number of differences so far.
        looks: K, number of times that the interval is looked at.
        confidence: 1 - alpha, for all looks together.
    """
    return math.sqrt(2 * math.log(2 * looks / (1 - confidence)) / count)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties by average rank; 0 where either is constant."""

    def ranks(x: Tensor) -> Tensor:
        below = (x[:, None] > x[None, :]).sum(1)
        equal = (x[:, None] == x[None, :]).sum(1)
        rank = below + (equal - 1) / 2
        return rank.double() - rank.double().mean()

    a, b = ranks(a), ranks(b)
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else 0.0
