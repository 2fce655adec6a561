"""LayerSampler: which layers train now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_cod.functional.randomness import generator_of
from hf_cod.scores import LayerScores

DEFAULT_FLOOR = 0.2


class LayerSampler:
    """Draws layers without replacement, with probability proportional to their scores.

        p_l = (1 - f) s_l / sum_k s_k + f / L

    OwLore (arXiv 2405.18380), section 3.2, with s the OWL outlier ratio and f = 0; uniform scores make it LISA (Pan et
    al. 2024, arXiv 2403.17919). The floor f is ours: without it a layer without outliers never trains, and with the
    scores that the authors ship and 5 of 32 layers about 9 layers are expected untrained after 10 draws.

    A draw depends on (seed, number of the draw) alone: processes agree without talking, and a resumed run needs
    nothing but the number.

    Args:
        scores: `LayerScores`, or one number of at least 0 a layer.
        n_active: layers of a draw, gamma.
        seed: of all draws.
        floor: f in [0, 1], the share of probability that all layers have alike; 1 is uniform.

    Raises:
        ValueError: a negative or infinite score, more layers than there are, a floor outside [0, 1].
    """

    def __init__(
        self, scores: LayerScores | Sequence[float], n_active: int, seed: int = 0, floor: float = DEFAULT_FLOOR
    ) -> None:
        values = torch.tensor(list(scores.values if isinstance(scores, LayerScores) else scores), dtype=torch.float64)
        if not 1 <= n_active <= len(values):
            raise ValueError(f"n_active: expected between 1 and the model's {len(values)} layers, got {n_active}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: expected a share between 0 and 1, got {floor}")
        wrong = [i for i, value in enumerate(values.tolist()) if not 0 <= value < float("inf")]
        if wrong:
            raise ValueError(
                f"scores: expected finite numbers of at least 0, got {values[wrong[0]]:g} in layer {wrong[0]}; "
                "shift them, or take scores of another method"
            )
        total, L = values.sum(), len(values)
        shares = values / total if total > 0 else torch.full_like(values, 1 / L)  # all 0: nothing is known of them
        self.probabilities: list[float] = ((1 - floor) * shares + floor / L).tolist()
        possible = sum(p > 0 for p in self.probabilities)
        if possible < n_active:
            raise ValueError(
                f"floor: expected above 0 to draw {n_active} layers, got {floor:g}, with {possible} scores above 0"
            )
        self.n_active, self.seed = n_active, seed

    def draw(self, number: int) -> list[int]:
        """The layers of draw `number`, counted from 0, in rising order."""
        chosen = torch.multinomial(
            torch.tensor(self.probabilities, dtype=torch.float64),
            self.n_active,
            replacement=False,
            generator=generator_of(self.seed, number),
        )
        return sorted(chosen.tolist())
