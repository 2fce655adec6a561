"""What `diagnose` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, SampleSettings, layers_path_field

Token = Literal["last", "first", "all"]
# Measure -> what it says of a layer; the first three come from one forward pass.
METRICS = {
    "angular_distance": "how far it turns the hidden state",
    "block_influence": "1 - cosine of its input and output",
    "output_variance": "variance of its output, and how much it adds to it",
    "gradient_norm": "norm of the loss's gradient by its weights",
    "layer_drop": "what a metric becomes without it",
}
FORWARD_METRICS = tuple(METRICS)[:3]


@checked
@dataclass
class DiagnoseSettings(SampleSettings):
    """What is measured, and how."""

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"any of {', '.join(METRICS)}; default: all that the model has outputs for",
            "alone": True,
        },
    )
    drop_metric: str | None = field(
        default=None,
        metadata={
            "help": "metric of the layer drop: perplexity, accuracy, loss, output_angle (how far the output turns) or "
            "an evaluate module; default: perplexity of a language model, accuracy or loss of another head with "
            "labels, else output_angle"
        },
    )
    token: Token = field(
        default="last", metadata={"help": "token at which angles are taken: last or first without padding, or all"}
    )
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.metrics, str):
            self.metrics = [self.metrics]
        unknown = set(self.metrics or ()) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")


class DiagnoseFields(SampleFields, total=False):
    """Fields of `DiagnoseSettings` that `diagnose` takes by name."""

    metrics: list[str] | None
    token: Token
    layers_path: str | None
