"""Settings of `diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, SampleSettings, check_effect, layers_path_field

Token = Literal["last", "first", "all"]
# Measure -> its description for a layer; the first three come from one forward pass.
METRICS = {
    "angular_distance": "angular distance between its input and output",
    "block_influence": "1 - cosine of its input and output",
    "output_variance": "variance of its output, and the share added by the layer",
    "gradient_norm": "norm of the gradient of the loss with respect to its weights",
    "layer_drop": "change of a metric if the layer is removed",
}
FORWARD_METRICS = tuple(METRICS)[:3]


@checked
@dataclass
class DiagnoseSettings(SampleSettings):
    """Measures of `diagnose` and their settings."""

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"measures to compute, any of {', '.join(METRICS)}; default: all that the model supports",
            "alone": True,
        },
    )
    drop_metric: str | None = field(
        default=None,
        metadata={
            "help": "metric of the layer drop: perplexity, accuracy, loss, output_angle (angle to the intact model's "
            "output) or an evaluate module; default: perplexity for language models, accuracy or loss for other heads "
            "with labels, else output_angle"
        },
    )
    token: Token = field(
        default="last",
        metadata={
            "help": "where angles are measured: at the last or first token that is not padding, or all: mean over "
            "tokens"
        },
    )
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.metrics, str):
            self.metrics = [self.metrics]
        unknown = set(self.metrics or ()) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")
        for name, metric in (("drop_metric", "layer_drop"), ("token", "angular_distance")):
            if self.metrics and metric not in self.metrics:
                check_effect(self, [name], f"metrics other than {metric}, which it is a setting of")


class DiagnoseFields(SampleFields, total=False):
    """Fields of `DiagnoseSettings` that `diagnose` takes by name."""

    metrics: list[str] | None
    token: Token
    layers_path: str | None
