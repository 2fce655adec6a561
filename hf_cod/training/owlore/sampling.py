"""LayerSampler: samples the layers that train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cod.functional.randomness import generator_of
from hf_cod.io.arguments import checked
from hf_cod.io.settings import resolve
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.active_layers import ActiveLayers
from hf_cod.training.owlore.settings import OwLoreSettings, SamplerSettings


class LayerSampler:
    """Samples layers without replacement, with probability proportional to their scores.

        p_l = (1 - f) s_l / sum_k s_k + f / L

    OwLore (arXiv 2405.18380), section 3.2, with s the OWL outlier ratio and f = 0. Uniform scores give LISA (Pan et
    al. 2024, arXiv 2403.17919). The floor f is an addition of this package: without it a layer without outliers never
    trains, and with the scores that the authors published and 5 of 32 layers, about 9 layers are expected to be
    untrained after 10 sampling rounds.

    A `LayerAllocation` of "probability" is used without a floor: each layer is sampled with exactly its probability, by
    systematic sampling in random order (Madow 1949). The sum of the probabilities must be `n_active`.

    The sampled layers depend on the seed and the number of the round only. All processes sample the same layers without
    communication, and a resumed run requires only the number.

    Args:
        scores: `LayerScores`, a `LayerAllocation` of "probability", or one number of at least 0 per layer.
        n_active: number of sampled layers, gamma; default: 5.
        seed: seed of all sampling rounds; default: 0.
        floor: f in [0, 1], the share of the probability that is spread uniformly over layers; 1 is uniform sampling;
            default: 0.2.
        layers: layers that can be sampled, L in number; None: all.
        settings: `SamplerSettings`, instead of single fields.

    Attributes:
        probabilities: one per layer: p, whose sum is 1; for an allocation, its values.

    Raises:
        ValueError: a negative or infinite score, more layers than can be sampled, a floor outside [0, 1], an allocation
            of another kind or with another sum.
    """

    @checked
    def __init__(
        self,
        scores: LayerScores | LayerAllocation | Sequence[float],
        n_active: int | None = None,
        seed: int | None = None,
        floor: float | None = None,
        layers: Sequence[int] | None = None,
        *,
        settings: SamplerSettings | None = None,
    ) -> None:
        how = resolve(LayerSampler, SamplerSettings, settings, {}, n_active=n_active, seed=seed, floor=floor)
        given = scores.values if isinstance(scores, (LayerScores, LayerAllocation)) else scores
        values = torch.tensor(list(given), dtype=torch.float64)
        possible = torch.zeros(len(values), dtype=torch.bool)
        possible[list(range(len(values)) if layers is None else layers)] = True
        if not 1 <= how.n_active <= int(possible.sum()):
            whole = f"the model's {len(values)}" if possible.all() else f"the {int(possible.sum())} trainable"
            raise ValueError(f"n_active: expected between 1 and {whole} layers, got {how.n_active}")
        values = values.where(possible, 0.0)
        self.n_active, self.seed = how.n_active, how.seed
        self._exact = isinstance(scores, LayerAllocation)
        if isinstance(scores, LayerAllocation):
            _check_allocation(scores, values, how.n_active)
            self.probabilities: list[float] = values.tolist()
        else:
            self.probabilities = _probabilities(values, possible, how.n_active, how.floor)

    def draw(self, number: int) -> list[int]:
        """The layers of sampling round `number`, counted from 0, in ascending order."""
        p, generator = torch.tensor(self.probabilities, dtype=torch.float64), generator_of(self.seed, number)
        if not self._exact:
            return sorted(torch.multinomial(p, self.n_active, replacement=False, generator=generator).tolist())
        order = torch.randperm(len(p), generator=generator)
        # Each layer is an interval as long as its probability; marks at distance 1, with one random offset, select.
        ends = p[order].cumsum(0)
        ends[-1] = self.n_active  # exact despite rounding
        marks = torch.arange(self.n_active) + torch.rand((), generator=generator, dtype=torch.float64)
        return sorted(order[torch.searchsorted(ends, marks, right=True)].tolist())


def _probabilities(values: Tensor, possible: Tensor, n_active: int, floor: float) -> list[float]:
    wrong = [i for i, value in enumerate(values.tolist()) if not 0 <= value < float("inf")]
    if wrong:
        raise ValueError(
            f"scores: expected finite numbers of at least 0, got {values[wrong[0]]:g} in layer {wrong[0]}; "
            "shift them, or use scores of another method"
        )
    total, L = values.sum(), int(possible.sum())
    shares = values / total if total > 0 else possible / L  # all scores 0: uniform
    p = (1 - floor) * shares + floor / L * possible
    drawn = int((p > 0).sum())
    if drawn < n_active:
        raise ValueError(
            f"floor: expected above 0 to sample {n_active} layers, got {floor:g} with {drawn} scores above 0"
        )
    return p.tolist()


def _check_allocation(plan: LayerAllocation, values: Tensor, n_active: int) -> None:
    if plan.kind != "probability":
        raise ValueError(f"scores: expected scores, or an allocation of probability, got one of {plan.kind}")
    if not bool(((values >= 0) & (values <= 1)).all()) or abs(float(values.sum()) - n_active) > 1e-9:
        raise ValueError(
            f"scores: expected probabilities in 0..1, whose sum over trainable layers is n_active = {n_active}, "
            f"got a sum of {float(values.sum()):g}; allocate with budget n_active / layers and "
            "layer_parameters=[1] * layers"
        )


def check_model(scores: LayerScores | LayerAllocation, stack: DecoderLayers) -> None:
    """Checks by the layers' sizes that scores are of this model; warns if only the model's name differs.

    Raises:
        ValueError: neither scores nor an allocation, another number of layers, or layers of other sizes.
    """
    if not isinstance(scores, (LayerScores, LayerAllocation)):
        raise ValueError(f"scores: expected LayerScores, a LayerAllocation or None, got {type(scores).__name__}")
    sizes = scores.parameters if isinstance(scores, LayerScores) else scores.sizes
    if len(scores.values) != len(stack):
        raise ValueError(f"scores: expected those of a model with {len(stack)} layers, got {len(scores.values)}")
    check_sizes("scores", scores.model, sizes, stack)


def make_sampler(
    scores: LayerScores | LayerAllocation | None, layers: ActiveLayers, settings: OwLoreSettings
) -> LayerSampler:
    """A sampler of the layers that have trainable parameters.

    Raises:
        ValueError: scores of another model, or `n_active` above the number of these layers.
    """
    if scores is not None:
        check_model(scores, layers.stack)
    trainable = [index for index, parameters in enumerate(layers.layers) if parameters]
    values = [1.0] * len(layers.layers) if scores is None else scores
    return LayerSampler(values, settings.n_active, settings.seed, settings.floor, layers=trainable)
