"""Settings that several commands share: samples to work and to measure on, and where results go.

Imports the standard library and other settings alone: `--help` waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.settings import PLOT_FORMATS, SampleSettings, as_in, check_choice
from hf_cod.scoring.settings import AllocationSettings, ScoreSettings


@dataclass
class MeasuringSettings(SampleSettings):
    """On which samples the work is done, and on which what comes of it is measured."""

    max_samples: int = field(default=32, metadata={"help": "samples to work on; more text is drawn from by seed"})
    eval_text: str | None = field(
        default=None, metadata={"help": "text to measure perplexity on; default: other samples of the same text"}
    )
    eval_samples: int = field(default=32, metadata={"help": "samples to measure perplexity on"})
    layers_path: str | None = as_in(ScoreSettings, "layers_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples: expected at least 1, got {self.eval_samples}")


@dataclass
class SpeedSettings:
    """Whether speed is measured."""

    speed: bool = field(
        default=True,
        metadata={
            "help": "measure how many tokens a second are read and generated, which takes some time of a big model"
        },
    )


@dataclass
class CompressionSettings(MeasuringSettings):
    """How layers are scored, and whether all layers alike are measured, too."""

    threshold: float = as_in(ScoreSettings, "threshold")
    per_module: bool = as_in(ScoreSettings, "per_module")
    baseline: bool = field(
        default=True, metadata={"help": "also treat all layers alike, to see what the score is worth; twice the time"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ScoreSettings(threshold=self.threshold)

    @property
    def of_owl(self) -> bool:
        """Whether a setting was changed that the score owl alone has: where no score was named, that one is meant."""
        return self.per_module or self.threshold != ScoreSettings().threshold


@dataclass
class SpreadSettings(CompressionSettings):
    """The same, for budgets of which each layer may get more or less."""

    spread: float | None = as_in(AllocationSettings, "spread")
    force: bool = field(
        default=False,
        metadata={
            "help": "keep the score where the perplexity of all layers alike is lower; default: all layers are then "
            "treated alike. With --no-baseline there is nothing to compare, and the score is always kept"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        AllocationSettings(spread=self.spread)


@dataclass
class PlotSettings:
    """Whether pictures are drawn, and as what."""

    plots: bool = field(default=True, metadata={"help": "draw the pictures (requires matplotlib)"})
    plot_format: str = field(
        default=PLOT_FORMATS[0], metadata={"help": "file format of the pictures", "choices": PLOT_FORMATS}
    )

    def __post_init__(self) -> None:
        check_choice("plot_format", self.plot_format, PLOT_FORMATS)


@dataclass
class ResultsOutput(PlotSettings):
    """Where results go."""

    output: str | None = field(
        default=None,
        metadata={"help": "new directory for model, report and pictures; default: hf-cod-COMMAND-MODEL"},
    )


@dataclass
class CompressionOutput(ResultsOutput):
    """The same, and what is read beside the model."""

    scores: str | None = field(default=None, metadata={"help": "scores.json of hf-cod score, instead of scoring anew"})


@dataclass
class TrainingOutput(PlotSettings):
    """What is read beside the model, and where results of a training go."""

    scores: str | None = as_in(CompressionOutput, "scores")
    output: str | None = field(
        default=None,
        metadata={
            "help": "directory for model and report, and for checkpoints of the training; default: hf-cod-COMMAND-MODEL"
        },
    )
