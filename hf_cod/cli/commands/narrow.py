"""hf-cod narrow MODEL: attention heads and MLP channels removed, more of them in layers that matter less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, SpeedSettings, SpreadSettings
from hf_cod.cli.step import Step
from hf_cod.compression.width.settings import NarrowSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores

# The cheapest score that never lost to all layers alike where measured: owl lost at 40 % fewer parameters, angular
# at 60 %.
DEFAULT_SCORE = "auto"
WITHOUT_LOSS = "angular"  # the best of those that need no loss, up to 40 %


@dataclass
class NarrowOptions(SpeedSettings, SpreadSettings):
    """What is removed, and on which samples."""

    method: str = as_in(NarrowSettings, "method")
    compensation: str = as_in(NarrowSettings, "compensation")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score that decides which layers lose more: {', '.join(SCORES)}; default: {DEFAULT_SCORE}, "
            f"{WITHOUT_LOSS} for a model whose loss cannot be measured, or owl beside --threshold or --per-module"
        },
    )
    parameter_share: float = field(default=0.8, metadata={"help": "share of the layers' weights to keep"})
    channel_multiple: int = as_in(NarrowSettings, "channel_multiple")

    def __post_init__(self) -> None:
        super().__post_init__()
        NarrowSettings(self.method, self.compensation, self.channel_multiple)
        if self.score is None and self.of_owl:
            self.score = "owl"
        if self.score is not None:
            check_choice("score", self.score, SCORES)
        if not 0 < self.parameter_share <= 1:
            raise ValueError(f"parameter_share: expected a share above 0 and at most 1, got {self.parameter_share}")
        if self.spread is not None:
            from hf_cod.scoring.layer_scores import LayerScores

            self.allocate(LayerScores("", "uniform", [1.0], [1]))  # budget and spread go together

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """The share of its weights that each layer keeps."""
        from hf_cod.scoring.allocation import allocate

        return allocate(scores, "parameter_share", self.parameter_share, self.spread)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, NarrowOptions, CompressionOutput],
        prog="hf-cod narrow",
        description="Removes attention heads and MLP channels, more of them in layers that matter less, and writes a "
        "smaller, dense model: a stock one where all layers come out alike and their family can say it, else one that "
        "from_pretrained loads where hf_cod is imported, and with trust_remote_code without it. Interrupted, the same "
        "command resumes. The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    from hf_cod.cli.compression import compress

    return compress(Narrow(settings), rest.model, loading, text, files)


class Narrow(Step):
    """Fewer heads and channels, by a plan of the layers' shares."""

    command, done = "narrow", "narrowed"

    def plan(self, work: Work) -> Any:
        """The share of its weights that each layer keeps."""
        share = self.settings.parameter_share
        # What sensitivity and auto try is sparsity: the nearest that they know.
        tried = {"target": 1 - share} if share < 1 else {}
        scores = work.score(self.settings.score or _default_score(work), **tried)
        return self.settings.allocate(scores)

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """All layers alike."""
        if not self.settings.baseline or work.scores is None or work.scores.method == "uniform":
            return {}
        alike = replace(work.scores, values=[1.0] * len(work.scores.values), method="uniform")
        return {"uniform": self.settings.allocate(alike)}

    def apply(self, work: Work, plan: Any) -> RunReport:
        """Narrows."""
        from hf_cod.compression.width.narrower import narrow

        return narrow(
            work.model,
            plan,
            method=self.settings.method,
            compensation=self.settings.compensation,
            channel_multiple=self.settings.channel_multiple,
            batches=work.calibration,
            name=work.name,
            **work.options,
        )

    def files(self, plan: Any) -> dict[str, Any]:
        """The allocation."""
        return {"allocation.json": plan}

    def told(self, plan: Any) -> dict[str, Any]:
        """What decided, where no score was named."""
        return {"score": plan.method}


def _default_score(work: Work) -> str:
    """What tries plans takes a language model whose weights are in floating point."""
    from hf_cod.layers.task import LANGUAGE_MODELS, task_of

    measured = task_of(work.model) in LANGUAGE_MODELS and not getattr(work.model, "is_quantized", False)
    return DEFAULT_SCORE if measured else WITHOUT_LOSS
