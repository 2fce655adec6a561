"""Settings of `diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_cod.analysis.generation.settings import GenerationSettings
from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, SampleSettings, as_in, check_effect, layers_path_field

Token = Literal["last", "first", "all"]
# Measure -> its description for a layer; the first three come from one forward pass. `MORE_METRICS` are computed on
# request.
METRICS = {
    "angular_distance": "angular distance between its input and output",
    "block_influence": "1 - cosine of its input and output",
    "output_variance": "variance of its output, and the share added by the layer",
    "gradient_norm": "norm of the gradient of the loss with respect to its weights",
    "layer_drop": "change of a metric if the layer is removed",
    "generation": "what the model answers to the prompts of tasks if the layer is removed",
    "usefulness": "rise of the loss with a linear map in its place",
    "causal_score": "change of what later layers add if it is skipped",
    "permutation_score": "rise of the loss if it and the next layer are swapped",
    "jacobian": "distance of its Jacobian from the identity",
    "attention_sinks": "attention to the first token, and share of heads with a sink there",
    "massive_activations": "largest entry of its output over the median, and number of massive entries",
    "logit_lens": "loss if the head reads its output",
}
FORWARD_METRICS = tuple(METRICS)[:3]
MORE_METRICS = tuple(METRICS)[6:]
EVERYTHING = "all"
# Measures that the metric of the layer drop judges.
BY_METRIC = ("layer_drop", "usefulness", "permutation_score", "logit_lens")
# Settings of the measure `generation` beside its tasks.
GENERATION = ("max_prompts", "max_new_tokens", "temperature", "stop_early")


@checked
@dataclass
class DiagnoseSettings(SampleSettings):
    """Measures of `diagnose` and their settings."""

    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"measures to compute, any of {', '.join(METRICS)}; or {EVERYTHING}: all that the model supports; "
            f"default: those that it supports up to {[*METRICS][5]}",
            "alone": True,
        },
    )
    drop_metric: str | None = field(
        default=None,
        metadata={
            "help": "metric of the layer drop, usefulness, permutation score and logit lens: perplexity, accuracy, "
            "loss, output_angle (angle to the intact model's output) or an evaluate module; default: perplexity for "
            "language models, accuracy or loss for other heads with labels, else output_angle"
        },
    )
    token: Token = field(
        default="last",
        metadata={
            "help": "where angles are measured: at the last or first token that is not padding, or all: mean over "
            "tokens"
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "tasks that the model answers without each layer: gym:NAME of reasoning-gym (gym:NAME@LEVEL, or "
            "gym:NAME,setting=value), lm-eval:NAME, or a file of prompts and answers, scored by exact match; "
            "default: none",
            "alone": True,
        },
    )
    max_prompts: int = as_in(GenerationSettings, "max_prompts")
    max_new_tokens: int = as_in(GenerationSettings, "max_new_tokens")
    temperature: float = as_in(GenerationSettings, "temperature")
    stop_early: bool = as_in(GenerationSettings, "stop_early")
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.metrics, str):
            self.metrics = [self.metrics]
        if isinstance(self.tasks, str):
            self.tasks = [self.tasks]
        self.generation()
        if self.metrics and EVERYTHING in self.metrics and len(self.metrics) > 1:
            raise ValueError(f"metrics: expected {EVERYTHING} alone, or names of measures, got both")
        unknown = set(() if self.everything else self.metrics or ()) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")
        of = {"drop_metric": BY_METRIC, "token": ("angular_distance",), "tasks": ("generation",)}
        for name, metrics in of.items():
            if self.metrics and not self.everything and not set(metrics) & set(self.metrics):
                check_effect(self, [name], f"metrics other than {' and '.join(metrics)}, which it is a setting of")
        if "generation" in (self.metrics or ()) and not self.tasks:
            raise ValueError("tasks: expected at least one for the measure generation, got none")
        if not self.tasks:
            check_effect(self, GENERATION, "measures that generate no answers; tasks gives the prompts")

    @property
    def everything(self) -> bool:
        """Whether all measures are wanted that the model supports."""
        return self.metrics == [EVERYTHING]

    @property
    def by_name(self) -> bool:
        """Whether measures were chosen by name, so that one that the model does not support is an error."""
        return self.metrics is not None and not self.everything

    def generation(self) -> GenerationSettings:
        """The settings of generation."""
        own = {name: getattr(self, name) for name in GENERATION}
        return GenerationSettings(**own, batch_size=self.batch_size, seed=self.seed)


class DiagnoseFields(SampleFields, total=False):
    """Fields of `DiagnoseSettings` that `diagnose` takes by name."""

    metrics: list[str] | None
    token: Token
    max_prompts: int
    max_new_tokens: int
    temperature: float
    stop_early: bool
    layers_path: str | None
