"""Settings that several commands share: calibration and evaluation samples, scores, plots and output.

Imports only the standard library and other settings, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.settings import (
    PLOT_FORMATS,
    DefaultName,
    DefaultNumber,
    SampleSettings,
    as_in,
    check_choice,
    check_least,
)
from hf_cod.scoring.settings import USE_THRESHOLD, AllocationSettings, ScoreSettings


@dataclass
class MeasuringSettings(SampleSettings):
    """Settings of calibration and evaluation samples."""

    max_samples: int = field(
        default=32,
        metadata={"help": "maximum number of calibration samples, chosen at random by seed if the text has more"},
    )
    eval_text: str | None = field(
        default=None, metadata={"help": "text for perplexity; default: held-out samples of the same text"}
    )
    eval_samples: int = field(default=32, metadata={"help": "number of samples for perplexity"})
    layers_path: str | None = as_in(ScoreSettings, "layers_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, eval_samples=1)


@dataclass
class SpeedSettings:
    """Settings of speed measurements."""

    speed: bool = field(
        default=True,
        metadata={
            "help": "measure tokens per second of prompt processing and generation (takes time with large models)"
        },
    )


@dataclass
class CompressionSettings(MeasuringSettings):
    """Settings of layer scores, and of the uniform baseline."""

    threshold: float = as_in(ScoreSettings, "threshold", default=DefaultNumber(ScoreSettings().threshold))
    per_module: bool = as_in(ScoreSettings, "per_module")
    baseline: bool = field(
        default=True, metadata={"help": "also measure a uniform plan, for comparison with the score; twice the time"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ScoreSettings(threshold=self.threshold)

    @property
    def of_owl(self) -> bool:
        """Whether a setting of the score owl is given; the commands then use owl if no score is given."""
        return bool(self._given("threshold", "per_module"))

    def _given(self, *names: str) -> list[str]:
        """Those of the settings that the user set."""
        found = {name: getattr(self, name, None) for name in names}
        defaults = (DefaultName, DefaultNumber)
        return [name for name, value in found.items() if value not in (None, False) and not isinstance(value, defaults)]

    def check_scored(self, scores_file: str | None, instead: str | None = None) -> None:
        """Checks that a scores file and settings of scores are only given if they have an effect.

        Not part of `__post_init__`, because the scores file is in the settings of the output.

        Args:
            scores_file: the scores file.
            instead: the option with its value that makes scores unnecessary, such as "bits 3"; None if they are used.

        Raises:
            ValueError: both a scores file and settings of scores are given, one of them with `instead`, or settings of
                owl with a score that does not depend on them.
        """
        given: dict[str, Any] = {} if instead is None else {"scores": scores_file}
        given |= {name: getattr(self, name) for name in self._given("score", "threshold", "per_module")}
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None and (instead or scores_file):
            beside = f"{instead}, which uses no scores" if instead else "scores, which are already computed"
            raise ValueError(f"{name}: expected none with {beside}, got {given[name]!r}")
        score, of_owl = getattr(self, "score", None), self._given("threshold", "per_module")
        if of_owl and score not in USE_THRESHOLD:
            got = score or "the default score of this command"
            raise ValueError(f"{of_owl[0]}: expected score owl, which it is a setting of, got {got}; set --score owl")


@dataclass
class SpreadSettings(CompressionSettings):
    """The same, for budgets that are distributed over layers by score."""

    spread: float | None = as_in(AllocationSettings, "spread")
    force: bool = field(
        default=False,
        metadata={
            "help": "apply the plan by score even if the uniform plan has a lower perplexity; default: the uniform "
            "plan is then applied. With --no-baseline there is no comparison, and the plan by score is always applied"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        AllocationSettings(spread=self.spread)


@dataclass
class PlotSettings:
    """Settings of plots."""

    plots: bool = field(default=True, metadata={"help": "save plots (requires matplotlib)"})
    plot_format: str = field(
        default=PLOT_FORMATS[0], metadata={"help": "file format of plots", "choices": PLOT_FORMATS}
    )

    def __post_init__(self) -> None:
        check_choice("plot_format", self.plot_format, PLOT_FORMATS)


@dataclass
class ResultsOutput(PlotSettings):
    """Settings of the output directory."""

    output: str | None = field(
        default=None,
        metadata={"help": "new directory for model, report and plots; default: hf-cod-COMMAND-MODEL"},
    )


@dataclass
class CompressionOutput(ResultsOutput):
    """The same, and a scores file as input."""

    scores: str | None = field(
        default=None, metadata={"help": "scores.json of hf-cod score; default: the layers are scored by this command"}
    )


@dataclass
class TrainingOutput(PlotSettings):
    """Settings of a scores file and of the output directory of a training."""

    scores: str | None = as_in(CompressionOutput, "scores")
    output: str | None = field(
        default=None,
        metadata={"help": "directory for model, report and training checkpoints; default: hf-cod-COMMAND-MODEL"},
    )
