"""hf-cod factorize MODEL: matrices as products of two thin ones, with ranks by how much layers or matrices matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, SpeedSettings, SpreadSettings
from hf_cod.cli.step import Step
from hf_cod.compression.low_rank.settings import RANK_SHARE, WEIGHINGS, FactorizeSettings
from hf_cod.io.settings import ModelSettings, TextSettings, as_in
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.compression.low_rank.rank_plan import RankPlan
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores

DEFAULT_SHARE = 0.8
# fisher, the default, is the best in each column of the table of ranks, by far; it costs one backward pass.
# These give each matrix a rank, all others each layer a share.
FISHER, SPECTRUM = OF_MATRICES = tuple(WEIGHINGS)
# These try plans of sparsity, which say little of ranks.
OF_SPARSITY = ("sensitivity", "auto")
CHOICES = (*OF_MATRICES, *(name for name in SCORES if name not in (*OF_MATRICES, *OF_SPARSITY)))


@dataclass
class FactorizeOptions(SpeedSettings, SpreadSettings):
    """What is factorized, and on which samples."""

    method: str = as_in(FactorizeSettings, "method")
    score: str | None = field(
        default=None,
        metadata={
            "help": "a rank for each matrix, by what its loss costs the model (fisher) or by how much of its output it "
            "loses (spectrum); or a share for each layer by "
            + ", ".join(CHOICES[len(OF_MATRICES) :])
            + f"; default: {FISHER} ({SPECTRUM} by entries, or for want of a loss), for oats, which takes shares "
            "alone, uniform"
        },
    )
    parameter_share: float | None = field(
        default=None,
        metadata={"help": f"share of the layers' weights to keep; default: {DEFAULT_SHARE}, or what rank makes"},
    )
    rank: float | None = field(
        default=None,
        metadata={
            "help": "share of full rank to keep, instead, by a score of layers (such as --score angular); what it "
            "would enlarge stays whole"
        },
    )
    rank_share: float = as_in(FactorizeSettings, "rank_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        FactorizeSettings(method=self.method, rank_share=self.rank_share)
        if self.method == "oats" and self.score is None:
            self.score = "uniform"
        if self.score not in (None, *CHOICES):
            raise ValueError(f"score: expected one of {', '.join(CHOICES)}, got {self.score!r}")
        for name in ("parameter_share", "rank"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {share}")
        if self.method != "oats" and self.rank_share != RANK_SHARE:
            raise ValueError(f"rank_share: expected method oats beside it, got {self.method}")
        if self.method == "oats" and (self.rank is not None or self.score in OF_MATRICES):
            got = self.score if self.rank is None else "rank"
            raise ValueError(f"method: expected parameter_share and a score of layers for oats, got {got}")
        if self.method == "plain" and self.score == FISHER:
            raise ValueError(f"score: expected {SPECTRUM} or a score of layers for plain, got {FISHER}")
        if self.rank is not None and self.parameter_share is not None:
            raise ValueError("rank: expected no parameter_share beside it, got both")

    @property
    def budget(self) -> float:
        """The share of parameters to keep, where that and not the rank is given."""
        return DEFAULT_SHARE if self.parameter_share is None else self.parameter_share

    def check_scores(self, scores_file: str | None) -> None:
        """Makes sure that a rank and a spread have scores of layers to follow, from a file if not by name, and that
        the spread has room beside the budget.

        Raises:
            ValueError: they have none, or it has none.
        """
        given = next((name for name in ("rank", "spread") if getattr(self, name) is not None), None)
        if given is not None and scores_file is None and self.score in (None, *OF_MATRICES):
            raise ValueError(f"{given}: expected a score of layers beside it, got {self.score or 'none'}")
        if self.spread is not None:
            from hf_cod.scoring.layer_scores import LayerScores

            self.allocate(LayerScores("", "uniform", [1.0], [1]))  # budget and spread go together

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """The share of its rank, or of its weights, that each layer keeps."""
        from hf_cod.scoring.allocation import allocate

        if self.rank is not None:
            return allocate(scores, "rank", self.rank, self.spread)
        return allocate(scores, "parameter_share", self.budget, self.spread)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FactorizeOptions, CompressionOutput],
        prog="hf-cod factorize",
        description="Replaces matrices of the layers by products of two thin ones, and writes a smaller, dense model "
        "that from_pretrained loads where hf_cod is imported, and with trust_remote_code without it; or, by oats, a "
        "model that is smaller once hf-cod pack has left out its zeros. Interrupted, the same command resumes. The "
        "model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    settings.check_scores(files.scores)
    from hf_cod.cli.compression import compress

    return compress(Factorize(settings), rest.model, loading, text, files)


class Factorize(Step):
    """Products of two thin matrices, by a plan of ranks or of the layers' shares."""

    command, done = "factorize", "factorized"

    def plan(self, work: Work) -> LayerAllocation | RankPlan:
        """Ranks of matrices, or shares of layers by scores."""
        chosen = self.settings
        if work.scores is None and (chosen.score is None or chosen.score in OF_MATRICES):
            from hf_cod.compression.low_rank.spectra import plan_ranks

            batches = work.calibration if chosen.method == "whitened" else None
            return plan_ranks(work.model, chosen.budget, chosen.score, batches=batches, **work.options)
        return chosen.allocate(work.score(chosen.score))

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """All layers alike."""
        if not self.settings.baseline or (work.scores is not None and work.scores.method == "uniform"):
            return {}
        from hf_cod.scoring.methods import score_layers

        alike = score_layers(work.model, method="uniform", layers_path=self.settings.layers_path)
        return {"uniform": replace(self.settings, score="uniform", spread=None).allocate(alike)}

    def apply(self, work: Work, plan: Any) -> RunReport:
        """Factorizes."""
        from hf_cod.compression.low_rank.factorizer import factorize

        more = {"batches": work.calibration, "rank_share": self.settings.rank_share, "name": work.name}
        return factorize(work.model, plan, self.settings.method, **more, **work.options)

    def files(self, plan: Any) -> dict[str, Any]:
        """The plan."""
        from hf_cod.compression.low_rank.rank_plan import RankPlan

        return {"rank_plan.json" if isinstance(plan, RankPlan) else "allocation.json": plan}

    def told(self, plan: Any) -> dict[str, Any]:
        """What decided."""
        return {"score": plan.method}
