"""hf-cod repeat-layers MODEL: run a block of layers of a model several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import MeasuringSettings, ResultsOutput, SpeedSettings
from hf_cod.cli.step import Step
from hf_cod.compression.depth.settings import RepeatSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in, check_effect

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.compression.depth.repeat_plan import RepeatPlan
    from hf_cod.io.report import RunReport


@dataclass
class RepeatLayersOptions(SpeedSettings, MeasuringSettings):
    """Settings of the block, or of the search for it, and of the samples."""

    start: int | None = field(
        default=None, metadata={"help": "first layer of the block, counted from 0; default: --search or --plan"}
    )
    end: int | None = field(
        default=None,
        metadata={
            "help": "the layer after the last one of the block, as in Python's range; default: --search or --plan"
        },
    )
    times: int = as_in(RepeatSettings, "times")
    search: bool = field(
        default=False,
        metadata={
            "help": "search for the block: choose it by the loss on one half of the calibration samples, and measure "
            "it on the other half; nothing is written if it does not lower the loss there"
        },
    )
    length: list[int] | None = field(
        default=None,
        metadata={"help": f"numbers of layers of the blocks that the search tries; default: {RepeatSettings().length}"},
    )
    force: bool = field(
        default=False, metadata={"help": "write the model with the best block also if it does not lower the loss"}
    )
    explain: bool = field(default=False, metadata={"help": "print the loss of each block that the search tried"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tried()
        if self.search and (self.start is not None or self.end is not None):
            raise ValueError("search: expected either search, or start and end, got both")
        for name, index, least in (("start", self.start, 0), ("end", self.end, 1)):
            if index is not None and index < least:
                raise ValueError(f"{name}: expected at least {least}, got {index}")
        if (self.start is None) != (self.end is None):
            name, other = ("end", "start") if self.end is None else ("start", "end")
            raise ValueError(f"{name}: expected an index beside {other}, got none")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end: expected more than start ({self.start}), got {self.end}")
        if not self.search:
            check_effect(self, ["length", "force", "explain"], "a given block, which no search chooses")

    def tried(self) -> RepeatSettings:
        """What the search tries."""
        return RepeatSettings(times=self.times) if self.length is None else RepeatSettings(self.length, self.times)

    def check_plan(self, plan: str | None) -> None:
        """Checks that there is a block, a search or a plan, and only one of them.

        Raises:
            ValueError: none, or a plan beside an option that it determines.
        """
        if plan is None:
            if self.start is None and not self.search:
                raise ValueError("start: expected a block by start and end, or search, got neither")
            return
        decided = ("start", "end", "times", "search")
        given = [f.name for f in fields(self) if f.name in decided and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"plan: expected no {given[0]}, which is part of the plan, got both")


@dataclass
class RepeatLayersOutput(ResultsOutput):
    """Settings of the output directory, and a plan file as input."""

    plan: str | None = field(
        default=None, metadata={"help": "repeat_plan.json of an earlier run; default: the block of this command"}
    )


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, RepeatLayersOptions, RepeatLayersOutput],
        prog="hf-cod repeat-layers",
        description="Runs a block of layers several times. The copies of the block are layers of their own, so a stock "
        "model remains a stock checkpoint, which is deeper and loads without hf_cod. The block is given, or searched "
        "for. After an interruption the same command resumes. The input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    settings.check_plan(files.plan)
    if files.plan is not None:
        from hf_cod.compression.depth.repeat_plan import RepeatPlan

        try:
            RepeatPlan.load(files.plan)  # checked before the model is loaded
        except ValueError as error:
            raise ValueError(f"plan{str(error).removeprefix(RepeatPlan.FIELD)}") from error  # the option's name
    from hf_cod.cli.compression import compress

    return compress(RepeatLayers(settings, files.plan), rest.model, loading, text, files)


class RepeatLayers(Step):
    """Repeats a block that is given, searched for, or read from a file."""

    command, done = "repeat-layers", "repeated"

    def __init__(self, settings: RepeatLayersOptions, plan_file: str | None) -> None:
        super().__init__(settings)
        self.plan_file = plan_file

    def identity(self) -> Any:
        """The settings and the plan file."""
        return [super().identity(), self.plan_file]

    def disk_share(self) -> float:
        """The model becomes larger."""
        return 1.0

    def check(self, work: Work) -> None:
        """Checks that the given block can be repeated."""
        from hf_cod.layers.removal.repeat import check_repeat

        chosen = self.settings
        if chosen.start is not None:
            check_repeat(work.model, chosen.start, chosen.end, chosen.times, chosen.layers_path)

    def plan(self, work: Work) -> RepeatPlan | None:
        """The block; None if the search found none that lowers the loss."""
        from hf_cod.compression.depth.repeat_plan import RepeatPlan
        from hf_cod.compression.depth.repeat_search import plan_repeat
        from hf_cod.io.display import say
        from hf_cod.layers.checks import name_of, sizes_of

        chosen, stack = self.settings, work.stack
        if self.plan_file is not None:
            return RepeatPlan.load(self.plan_file)
        if chosen.start is not None:
            return RepeatPlan(name_of(stack), chosen.start, chosen.end, sizes_of(stack), chosen.times)
        self._tell_cost(work)
        plan = plan_repeat(work.model, settings=chosen.tried(), batches=work.calibration, **work.options)
        if chosen.explain:
            from hf_cod.cli.explained import explain_repetition

            explain_repetition(plan)
        if plan.gains or chosen.force:
            return plan
        for sentence in plan.summary():
            say(sentence)
        say("--force writes the model with this block all the same.")
        return None

    def _tell_cost(self, work: Work) -> None:
        from hf_cod.compression.depth.repeat_search import blocks_of, search_cost
        from hf_cod.io.display import say
        from hf_cod.io.text import describe_batches

        depth, lengths = len(work.stack), self.settings.tried().lengths
        seen = describe_batches(work.calibration)["samples"] // 2
        say(
            f"search: {len(blocks_of(depth, lengths))} blocks on {seen} samples take as long as "
            f"{search_cost(depth, lengths, self.settings.times):.0f} forward passes of these samples"
        )

    def apply(self, work: Work, plan: RepeatPlan) -> RunReport:
        """Repeats the block."""
        from hf_cod.compression.depth.repeater import repeat_layers

        return repeat_layers(work.model, plan, layers_path=self.settings.layers_path, name=work.name)

    def files(self, plan: RepeatPlan) -> dict[str, Any]:
        """The plan."""
        return {"repeat_plan.json": plan}

    def told(self, plan: RepeatPlan) -> dict[str, Any]:
        """The criterion and the plan file."""
        return {"criterion": plan.criterion, "plan": self.plan_file}
