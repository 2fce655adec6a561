"""hf-cod narrow MODEL: attention heads and MLP channels removed, more of them in layers that matter less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, SpeedSettings, SpreadSettings
from hf_cod.cli.step import Step
from hf_cod.compression.width.settings import NarrowSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import ScoreSettings

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport


@dataclass
class NarrowOptions(SpeedSettings, SpreadSettings):
    """What is removed, and on which samples."""

    method: str = as_in(NarrowSettings, "method")
    compensation: str = as_in(NarrowSettings, "compensation")
    score: str = as_in(ScoreSettings, "method")
    parameter_share: float = field(default=0.8, metadata={"help": "share of the layers' weights to keep"})
    channel_multiple: int = as_in(NarrowSettings, "channel_multiple")

    def __post_init__(self) -> None:
        super().__post_init__()
        NarrowSettings(self.method, self.compensation, self.channel_multiple)
        check_choice("score", self.score, SCORES)
        if not 0 < self.parameter_share <= 1:
            raise ValueError(f"parameter_share: expected a share above 0 and at most 1, got {self.parameter_share}")


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
        from hf_cod.scoring.allocation import allocate

        share = self.settings.parameter_share
        # What sensitivity and auto try is sparsity: the nearest that they know.
        scores = work.score(self.settings.score, **({"target": 1 - share} if share < 1 else {}))
        return allocate(scores, "parameter_share", share, self.settings.spread)

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """All layers alike."""
        wanted = self.settings.baseline and work.scores is not None and work.scores.method != "uniform"
        return {"uniform": self.settings.parameter_share} if wanted else {}

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
