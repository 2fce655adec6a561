"""What an optimizer is told, checked by itself and against the model."""

from __future__ import annotations

from hf_cod.allocation import LayerAllocation
from hf_cod.finetuning.active_layers import ActiveLayers
from hf_cod.finetuning.given_scores import check_model
from hf_cod.finetuning.sampling import LayerSampler
from hf_cod.finetuning.settings import OwLoreSettings
from hf_cod.scores import LayerScores


def make_sampler(
    scores: LayerScores | LayerAllocation | None, layers: ActiveLayers, settings: OwLoreSettings
) -> LayerSampler:
    """A sampler of the layers that have something to train.

    Raises:
        ValueError: scores of another model, or more layers at a time than there are.
    """
    if scores is not None:
        check_model(scores, layers.stack)
    trainable = [index for index, parameters in enumerate(layers.layers) if parameters]
    values = [1.0] * len(layers.layers) if scores is None else scores
    return LayerSampler(values, settings.n_active, settings.seed, settings.floor, trainable)


def check_rank(rank: int | None, layers: ActiveLayers) -> None:
    """Raises ValueError where a rank does not fit what trains."""
    if rank is not None and layers.other_adapters:
        raise ValueError(
            f"rank: expected None beside LoRA adapters, whose matrices are of low rank already, got {rank}"
        )
    widths = [min(p.shape[-2:]) for parameters in layers.layers for p in parameters if p.ndim >= 2]
    if rank is not None and widths and rank > max(widths):
        raise ValueError(f"rank: expected at most {max(widths)}, the width of the layers' matrices, got {rank}")


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises ValueError where one is out of range."""
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
