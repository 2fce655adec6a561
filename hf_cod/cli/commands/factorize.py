"""hf-cod factorize MODEL: replace matrices by low-rank factors, with ranks by importance of layers or matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.plan_settings import check_parts
from hf_cod.cli.settings import CompressionOutput, SpeedSettings, SpreadSettings
from hf_cod.cli.step import Step, uniform_baseline
from hf_cod.compression.low_rank.settings import FACTOR_SHARE, WEIGHINGS, FactorizeSettings
from hf_cod.io.module_names import ModuleSettings, Names, check_names, given_names
from hf_cod.io.settings import DefaultName, ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import ScoreSettings

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.compression.low_rank.rank_plan import RankPlan
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.layer_scores import LayerScores

DEFAULT_SHARE = 0.8
# fisher, the default, is the best by far in each column of the table of ranks; it costs one backward pass.
# These set a rank for each matrix; all other scores set a share for each layer.
FISHER, SPECTRUM = OF_MATRICES = tuple(WEIGHINGS)
# These scores evaluate sparsity plans, which are a poor predictor for ranks.
OF_SPARSITY = ("sensitivity", "kl", "auto")
CHOICES = (*OF_MATRICES, *(name for name in SCORES if name not in (*OF_MATRICES, *OF_SPARSITY)))


@dataclass
class FactorizeOptions(SpeedSettings, SpreadSettings):
    """Settings of the factorization, and of samples."""

    method: str = as_in(FactorizeSettings, "method")
    score: str | None = field(
        default=None,
        metadata={
            "help": "how ranks are chosen. One for each matrix: by the expected increase of the loss (fisher), or by "
            "the lost share of its output (spectrum). One share for each layer, by its score: "
            + ", ".join(CHOICES[len(OF_MATRICES) :])
            + f"; default: {FISHER}; {SPECTRUM} with --method plain or for models without a loss; uniform with "
            "--method oats, which requires a share for each layer"
        },
    )
    parameter_share: float | None = field(
        default=None,
        metadata={
            "help": f"share of the layers' weights to keep, 0 to 1; default: {DEFAULT_SHARE}, or as --full-rank-share "
            "requires"
        },
    )
    full_rank_share: float | None = field(
        default=None,
        metadata={
            "help": "share of the matrices' full rank to keep, 0 to 1, instead of --parameter-share; default: not "
            "used. Requires a score of layers, such as --score angular. Matrices whose factors would be larger are "
            "left unchanged"
        },
    )
    factor_share: float = as_in(FactorizeSettings, "factor_share")
    expert_basis: str = as_in(FactorizeSettings, "expert_basis")
    granularity: str = as_in(ScoreSettings, "granularity")
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        super().__post_init__()
        FactorizeSettings(method=self.method, factor_share=self.factor_share, expert_basis=self.expert_basis)
        check_names(self)
        if self.method == "oats" and self.score is None:
            self.score = DefaultName("uniform")
        if self.score is not None:
            check_choice("score", self.score, CHOICES)
        check_parts(self)
        if self.granularity != "layer" and self.method == "oats":
            raise ValueError(f"granularity: expected layer with method oats, got {self.granularity}")
        for name in ("parameter_share", "full_rank_share"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {share}")
        if self.method != "oats" and self.factor_share != FACTOR_SHARE:
            raise ValueError(f"factor_share: expected method oats, got {self.method}")
        if self.method == "oats" and (self.full_rank_share is not None or self.score in OF_MATRICES):
            got = self.score if self.full_rank_share is None else "full_rank_share"
            raise ValueError(f"method: expected parameter_share and a score of layers for oats, got {got}")
        if self.method == "plain" and self.score == FISHER:
            raise ValueError(f"score: expected {SPECTRUM} or a score of layers for plain, got {FISHER}")
        if self.full_rank_share is not None and self.parameter_share is not None:
            raise ValueError("full_rank_share: expected either full_rank_share or parameter_share, got both")

    @property
    def budget(self) -> float:
        """The share of parameters to keep, if no share of full rank is set."""
        return DEFAULT_SHARE if self.parameter_share is None else self.parameter_share

    def check_scores(self, scores_file: str | None) -> None:
        """Checks that a share of full rank or a spread has scores of layers, by name or from a file, and that it fits.

        Raises:
            ValueError: there are no scores of layers, or the spread does not fit the budget.
        """
        given = next((name for name in ("full_rank_share", "spread") if getattr(self, name) is not None), None)
        if given is not None and scores_file is None and self.score in (None, *OF_MATRICES):
            got = self.score or "none"
            raise ValueError(f"{given}: expected a score of layers, got {got}; set --score or --scores")
        if self.spread is not None:
            self.check_spread()

    def allocate(self, scores: LayerScores) -> LayerAllocation:
        """For each layer, the share of rank or of weights to keep."""
        from hf_cod.scoring.allocation import allocate

        if self.full_rank_share is not None:
            return allocate(scores, "rank", self.full_rank_share, self.spread)
        return allocate(scores, "parameter_share", self.budget, self.spread)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, FactorizeOptions, CompressionOutput],
        prog="hf-cod factorize",
        description="Replaces matrices of the layers by low-rank factors, and writes a smaller, dense model that "
        "from_pretrained loads if hf_cod is imported, and otherwise with trust_remote_code. With --method oats the "
        "model becomes smaller only after hf-cod pack, which removes the zeros. After an interruption the same "
        "command resumes. The input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    settings.check_scored(files.scores)
    settings.check_scores(files.scores)
    from hf_cod.cli.compression import compress

    return compress(Factorize(settings), rest.model, loading, text, files)


class Factorize(Step):
    """Low-rank factors, by a plan of ranks or of shares of layers."""

    command, done = "factorize", "factorized"
    earlier: ClassVar[dict[str, str]] = {"full_rank_share": "rank", "factor_share": "rank_share"}

    def check(self, work: Work) -> None:
        """Checks that the matrices can be replaced by others, and the result can be saved."""
        from hf_cod.layers.checks import check_reshapeable

        check_reshapeable(work.stack, "factorize")

    def plan(self, work: Work) -> LayerAllocation | RankPlan:
        """Ranks of matrices, or shares of layers by score."""
        chosen = self.settings
        if work.scores is None and (chosen.score is None or chosen.score in OF_MATRICES):
            from hf_cod.compression.low_rank.spectra import plan_ranks

            batches = work.calibration if chosen.method == "whitened" else None
            how = {"expert_basis": chosen.expert_basis, **self._chosen, **work.options}
            return plan_ranks(work.model, chosen.budget, chosen.score, batches=batches, **how)
        return chosen.allocate(work.score(chosen.score))

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """The same share for all layers."""
        from hf_cod.scoring.methods import score_layers

        # A plan of ranks of matrices has no scores of layers.
        scores = work.scores or score_layers(work.model, method="uniform", layers_path=self.settings.layers_path)
        return uniform_baseline(plan, self.settings, scores)

    def apply(self, work: Work, plan: Any) -> RunReport:
        """Factorizes the matrices."""
        from hf_cod.compression.low_rank.factorizer import factorize

        how = {name: getattr(self.settings, name) for name in ("factor_share", "expert_basis")}
        more = {"batches": work.calibration, "name": work.name, **how}
        report = factorize(work.model, plan, self.settings.method, **more, **self._chosen, **work.options)
        if self.settings.score is None and plan.method == SPECTRUM:
            why = f"{FISHER} requires the loss of a language model on samples"
            report.notes.append(f"ranks are by {SPECTRUM}, the default here: {why}")
        return report

    @property
    def _chosen(self) -> dict[str, Any]:
        """The choice of matrices."""
        return given_names(self.settings)

    def files(self, plan: Any) -> dict[str, Any]:
        """The plan."""
        from hf_cod.compression.low_rank.rank_plan import RankPlan

        return {"rank_plan.json" if isinstance(plan, RankPlan) else "allocation.json": plan}

    def told(self, plan: Any) -> dict[str, Any]:
        """The score of the plan."""
        return {"score": plan.method}
