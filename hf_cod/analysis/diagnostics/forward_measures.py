"""What the forward pass of `diagnose` measures of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cod.functional import depth


@dataclass(frozen=True)
class ForwardMeasures:
    """Measures of every layer and sample; S samples, L layers, all on the CPU.

    Attributes:
        distances: (S, L + 1, L + 1) float64, angular distance in [0, 1] between the inputs of layers l and m (index L:
            the output of the last layer). Empty if not requested.
        influence: (S, L), block influence of each layer. Empty if not requested.
        outputs: (R, L + 1, 4), `depth.moments` of the stack's input and of each layer's output, over all samples'
            tokens, for each of R runs; R is 1 unless layers run several times in a forward pass. Of a run that a layer
            does not have they are zero.
        updates: (R, L, 4), `depth.moments` of each layer's update: its output minus its input.
        dtype: dtype of the hidden states; the least precise one if there are several.
        not_run: layers that the model passed over on all of these inputs, such as cross-attention without images. Their
            output is their input.
        runs: number of runs of each layer in a forward pass, the largest of all batches.
    """

    distances: Tensor
    influence: Tensor
    outputs: Tensor
    updates: Tensor
    dtype: torch.dtype
    not_run: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()

    def angular_distance(self) -> Tensor:
        """(L, L): mean distance d(x^l, x^(l+n)) at [l, n - 1]; NaN if l + n > L or no run has these layers."""
        return depth.by_layer_and_step(self.distances.mean(0))

    def idle_below(self) -> float:
        """The angular distance that rounding alone can cause; layers with a smaller one have no measurable effect."""
        return depth.angular_resolution(self.dtype)

    def output_variance(self) -> dict[str, list[float]]:
        """For each layer's output over all tokens and channels: variance (population), mean, max_abs; and added_share,
        the variance of the layer's update x^(l+1) - x^l over that of its output x^(l+1).

        Of a layer that runs several times they are means over its runs; max_abs is the largest of all.

        Output variance is the quantity of Figure 1 in arXiv 2502.05795.
        """
        outputs = self.outputs[:, 1:]
        ran = outputs[..., 0] > 0
        mean, variance = _mean_and_variance(outputs)
        _, update_variance = _mean_and_variance(self.updates)
        return {
            "variance": _over_runs(variance, ran),
            "mean": _over_runs(mean, ran),
            "max_abs": outputs[..., 3].amax(0).tolist(),
            "added_share": _over_runs(update_variance / variance, ran),
        }


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    count, total, squares, _ = sums.unbind(-1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def _over_runs(values: Tensor, ran: Tensor) -> list[float]:
    """Means of (R, L) values over the runs that each layer has."""
    return (values.where(ran, 0).sum(0) / ran.sum(0)).tolist()
