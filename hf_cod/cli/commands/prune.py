"""hf-cod prune MODEL: zeros in a model's matrices, distributed over layers by how much they matter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, SpreadSettings
from hf_cod.cli.step import Step
from hf_cod.compression.pruning.settings import PruneSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import PRUNERS
from hf_cod.training.healing.settings import RecoverySettings

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores

DEFAULT_SPARSITY = 0.5
# The cheapest score that beat all layers alike in each cell of the table (3 methods x 50, 60, 70 %); owl lost one.
DEFAULT_SCORE = "angular"


@dataclass
class PruneOptions(SpreadSettings):
    """What is pruned, and on which samples."""

    method: str = as_in(PruneSettings, "method")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score that decides which layers lose more: {', '.join(SCORES)}; default: {DEFAULT_SCORE}, or owl "
            "beside --threshold or --per-module"
        },
    )
    sparsity: float | None = field(
        default=None, metadata={"help": f"share of zeros; default: {DEFAULT_SPARSITY}, or what the pattern makes"}
    )
    pattern: str | None = field(
        default=None,
        metadata={"help": "2:4 keeps 2 of each 4 weights in every layer; N:8 chooses N for each layer by its score"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        PruneSettings(method=self.method)
        if self.score is None:
            self.score = "owl" if self.of_owl else DEFAULT_SCORE
        check_choice("score", self.score, SCORES)
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a share in 0..1, got {self.sparsity}")
        if self.fixed and (self.sparsity is not None or self.spread is not None):
            raise ValueError(f"pattern: expected {self.pattern} without sparsity and spread, which follow from it")
        if not self.fixed:
            self.check_budget()

    @property
    def fixed(self) -> str | None:
        """The pattern if it is one for all layers."""
        if self.pattern is None or self.group is not None:
            return None
        from hf_cod.compression.pruning.pruner import parse_pattern

        parse_pattern(self.pattern)
        return self.pattern

    @property
    def group(self) -> int | None:
        """The M of N:M where each layer has its own N."""
        found = re.fullmatch(r"N:(\d+)", self.pattern or "")
        return int(found[1]) if found else None

    @property
    def budget(self) -> float:
        """The sparsity that the layers share."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """The sparsity of each layer."""
        from hf_cod.scoring.allocation import allocate

        return allocate(scores, "sparsity", self.budget, self.spread, group=self.group)

    def check_budget(self) -> None:
        """Makes sure that budget, spread and group go together.

        Raises:
            ValueError: they do not.
        """
        from hf_cod.scoring.layer_scores import LayerScores

        self.allocate(LayerScores("", "uniform", [1.0], [1]))


@dataclass
class RecoveryOptions:
    """How a pruned model is trained on, as options beside those of pruning."""

    recover: int = field(
        default=0, metadata={"help": "training steps of LoRA after pruning; zeros stay zeros (needs peft)"}
    )
    recover_rank: int = as_in(RecoverySettings, "rank")
    recover_learning_rate: float = as_in(RecoverySettings, "learning_rate")

    def __post_init__(self) -> None:
        for name, least in (("recover", 0), ("recover_rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.recover_learning_rate < math.inf:
            raise ValueError(f"recover_learning_rate: expected a number above 0, got {self.recover_learning_rate}")


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, PruneOptions, RecoveryOptions, CompressionOutput],
        prog="hf-cod prune",
        description="Sets weights of the layers' matrices to zero, more of them in layers that matter less, and writes "
        "a model that from_pretrained loads. Interrupted, the same command resumes. The model itself is never touched. "
        "Zeros alone do not make a model faster.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, recovery, files, rest = make_parser().parse(arguments)
    if settings.fixed and files.scores is not None:
        raise ValueError(f"scores: expected none beside pattern {settings.fixed}, got {files.scores!r}")
    if recovery.recover and find_spec("peft") is None:
        raise ImportError("recover: LoRA needs the peft package: pip install 'hf_cod[recovery]'")
    from hf_cod.cli.compression import compress

    return compress(Prune(settings, recovery), rest.model, loading, text, files)


class Prune(Step):
    """Zeros by a plan of the layers' sparsity, or by one pattern for all layers."""

    command, done = "prune", "pruned"

    def __init__(self, settings: PruneOptions, recovery: RecoveryOptions) -> None:
        super().__init__(settings)
        self.recovery = recovery

    def identity(self) -> Any:
        """Recovery among it."""
        return [super().identity(), asdict(self.recovery)]

    def disk_share(self) -> float:
        """Zeros are stored as other weights are."""
        return 1.0

    def check(self, work: Work) -> None:
        """Weights that cannot be written, and rows that are not whole groups."""
        from hf_cod.compression.pruning.methods import check_pattern
        from hf_cod.compression.pruning.pruner import parse_pattern
        from hf_cod.layers.checks import check_writable

        check_writable(work.stack)
        M = self.settings.group or (parse_pattern(self.settings.fixed)[1] if self.settings.fixed else None)
        if M is not None:
            check_pattern(work.stack, M)

    def plan(self, work: Work) -> LayerAllocation | str:
        """An allocation by scores, or the pattern."""
        if self.settings.fixed:
            return self.settings.fixed
        chosen: dict[str, Any] = {}
        if 0 < self.settings.budget < 1:
            chosen["target"] = self.settings.budget
        if self.settings.method in PRUNERS:  # SparseGPT, which is dear to try, is judged by Wanda
            chosen["pruner"] = self.settings.method
        return self.settings.allocate(work.score(str(self.settings.score), **chosen))

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """All layers alike."""
        if not self.settings.baseline or work.scores is None or work.scores.method == "uniform":
            return {}
        alike = replace(work.scores, values=[1.0] * len(work.scores.values), method="uniform")
        return {"uniform": self.settings.allocate(alike)}

    def apply(self, work: Work, plan: Any) -> RunReport:
        """Prunes."""
        from hf_cod.compression.pruning.pruner import prune

        return prune(work.model, plan, self.settings.method, batches=work.calibration, name=work.name, **work.options)

    @property
    def trained(self) -> str | None:
        """Recovery, where it was asked for."""
        return "recovered" if self.recovery.recover else None

    def train(self, work: Work) -> None:
        """Recovers, with zeros that stay."""
        from hf_cod.training.healing.recovery import recover

        recover(
            work.model,
            work.calibration,
            self.recovery.recover,
            rank=self.recovery.recover_rank,
            learning_rate=self.recovery.recover_learning_rate,
            seed=self.settings.seed,
            layers_path=self.settings.layers_path,
            show_progress=True,
        )

    def files(self, plan: Any) -> dict[str, Any]:
        """The allocation, where there is one."""
        return {} if isinstance(plan, str) else {"allocation.json": plan}

    def measure(self, saved: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Zeros as they were saved."""
        from hf_cod.compression.pruning.methods import measure_sparsity

        return measure_sparsity(saved)

    def told(self, plan: Any) -> dict[str, Any]:
        """How it recovered."""
        return asdict(self.recovery)

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """The share of zeros."""
        weights = sum(report.layers["parameters"])
        return [f"{report.results['sparsity']:.2%} of {weights:,} weights in the saved model's matrices are zero."]
