"""Settings that several commands share: calibration and evaluation samples, scores, plots and output.

Imports only the standard library and other settings, so that `--help` is fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_cod.cli.sizes import parse_bytes
from hf_cod.io.settings import (
    PLOT_FORMATS,
    DefaultNumber,
    ModelSettings,
    SampleSettings,
    as_in,
    check_choice,
    check_effect,
    check_least,
    given,
)
from hf_cod.scoring.settings import (
    COMPUTED,
    EXPERT,
    AllocationSettings,
    ScoreSettings,
    options_of,
    score_with,
)
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.training.healing.settings import RecoverySettings

if TYPE_CHECKING:
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores


@dataclass
class MeasuringSettings(SampleSettings):
    """Settings of calibration and evaluation samples."""

    max_samples: int = field(
        default=32,
        metadata={"help": "maximum number of calibration samples, chosen at random by seed if the text has more"},
    )
    eval_text: str | None = field(
        default=None,
        metadata={"help": "text file or dataset on which perplexity is measured; default: held-out samples of --text"},
    )
    eval_samples: int = field(default=32, metadata={"help": "number of samples on which perplexity is measured"})
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
        default=True,
        metadata={
            "help": "also measure the uniform plan (the same value for all layers), for comparison; doubles the time"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ScoreSettings(**self.of_scores())

    def of_scores(self, score: str | None = None) -> dict[str, Any]:
        """The settings of a score, or of any score if none is named. A plan by expert has scores of layers."""
        names = options_of(self, score)
        return {n: getattr(self, n) for n in names if n != "granularity" or getattr(self, n) != EXPERT}

    @property
    def implied_score(self) -> str | None:
        """The score of which a setting is given, which the commands use if no score is given; None without settings."""
        return next((score_with(name) for name in given(self, self.of_scores())), None)

    def check_scored(self, scores_file: str | None, instead: str | None = None) -> None:
        """Checks that a scores file and settings of scores are only given if they have an effect.

        Not part of `__post_init__`, because the scores file is in the settings of the output.

        Args:
            scores_file: the scores file.
            instead: the option with its value that makes scores unnecessary, such as "bits 3"; None if they are used.

        Raises:
            ValueError: both a scores file and settings of scores are given, one of them with `instead`, or settings of
                a score with another score that does not depend on them.
        """
        if instead and scores_file is not None:
            raise ValueError(f"scores: expected none with {instead}, which uses no scores, got {scores_file!r}")
        if instead or scores_file is not None:
            names = ("score", *self.of_scores())
            check_effect(self, names, f"{instead}, which uses no scores" if instead else COMPUTED)
        score = getattr(self, "score", None)
        used = options_of(self, score) if score in SCORES else []
        for name in given(self, self.of_scores()):
            if name not in used:
                got, known = score or "the default score of this command", score_with(name)
                raise ValueError(
                    f"{name}: expected score {known}, which it is a setting of, got {got}; set --score {known}"
                )


@dataclass
class SpreadSettings(CompressionSettings):
    """The same, for budgets that are distributed over layers by score."""

    spread: float | None = as_in(AllocationSettings, "spread")
    force: bool = field(
        default=False,
        metadata={
            "help": "apply the plan by score even if the uniform plan has a lower perplexity; default: apply the one "
            "with the lower perplexity. With --no-baseline the plan by score is always applied"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        AllocationSettings(spread=self.spread)

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """The plan of the command for these scores."""
        raise NotImplementedError

    def check_spread(self) -> None:
        """Checks that spread and budget are compatible, with a plan for a model of one layer.

        Raises:
            ValueError: they are not.
        """
        from hf_cod.scoring.layer_scores import LayerScores

        self.allocate(LayerScores("", "uniform", [1.0], [1]))

    def check_scored(self, scores_file: str | None, instead: str | None = None) -> None:
        """Checks also that a spread is not given with equal scores."""
        super().check_scored(scores_file, instead)
        spread = ["spread"] if getattr(self, "granularity", "") != EXPERT else []
        if scores_file is None and getattr(self, "score", None) == "uniform":
            check_effect(self, spread, "score uniform, by which all layers are treated alike")


@dataclass
class RecoveryOptions:
    """Settings of recovery training after pruning."""

    recover_steps: int = field(
        default=0,
        metadata={
            "help": "number of LoRA training steps after pruning, which keep the zeros and require peft; 0: no training"
        },
    )
    recover_rank: int = as_in(RecoverySettings, "rank")
    recover_learning_rate: float = as_in(RecoverySettings, "learning_rate")

    def __post_init__(self) -> None:
        check_least(self, recover_steps=0, recover_rank=1)
        if not 0 < self.recover_learning_rate < math.inf:
            raise ValueError(f"recover_learning_rate: expected a number above 0, got {self.recover_learning_rate}")
        if not self.recover_steps:
            check_effect(self, ("recover_rank", "recover_learning_rate"), "recover_steps 0, which trains nothing")


@dataclass
class LimitedModelSettings(ModelSettings):
    """Settings of model loading, and a limit of memory."""

    max_memory: str | None = field(
        default=None,
        metadata={
            "help": "the most memory that the process may take, such as 4GB: the weights stay in the model's files, "
            "and memory holds one layer at a time (CPU); default: all weights in memory, without a limit"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory is not None and parse_bytes(self.max_memory, "max_memory") <= 0:
            raise ValueError(f"max_memory: expected more than 0 bytes, got {self.max_memory!r}")

    def without_limit(self) -> ModelSettings:
        """The settings that results depend on."""
        return ModelSettings(**{f.name: getattr(self, f.name) for f in fields(ModelSettings)})

    def limit(self) -> int | None:
        """The limit in bytes; None without one."""
        return None if self.max_memory is None else parse_bytes(self.max_memory, "max_memory")


@dataclass
class PlotSettings:
    """Settings of plots."""

    plots: bool = field(default=True, metadata={"help": "save plots (requires matplotlib)"})
    plot_format: str = field(
        default=PLOT_FORMATS[0],
        metadata={"help": f"file format of plots: {', '.join(PLOT_FORMATS)}", "choices": PLOT_FORMATS},
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
        default=None,
        metadata={
            "help": "scores.json of hf-cod score, or a file of another tool (sensitivities of MLX, layer_config of "
            "AutoRound, imatrix.gguf of llama.cpp, a .csv of module,number); default: the layers are scored by this "
            "command"
        },
    )


@dataclass
class TrainingOutput(PlotSettings):
    """Settings of a scores file and of the output directory of a training."""

    scores: str | None = field(
        default=None, metadata={"help": "scores.json of hf-cod score; default: the layers are scored by this command"}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "directory for model, report and training checkpoints; default: hf-cod-COMMAND-MODEL"},
    )
