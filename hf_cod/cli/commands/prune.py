"""hf-cod prune MODEL: set weights to zero, distributed over layers by importance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.plan_settings import PartSettings, PlanSearchSettings, check_parts
from hf_cod.cli.settings import CompressionOutput, LimitedModelSettings, RecoveryOptions, SpreadSettings
from hf_cod.cli.step import Step, uniform_baseline
from hf_cod.compression.pruning.settings import PruneSettings
from hf_cod.io.module_names import ModuleSettings, Names, check_names, given_names
from hf_cod.io.settings import DefaultName, TextSettings, as_in, check_choice, check_effect
from hf_cod.scoring.settings import METHODS as SCORES
from hf_cod.scoring.settings import PRUNERS, options_of

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.layers.memory_limit import Copies
    from hf_cod.layers.stack import DecoderLayers
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.expert_scores import ExpertScores
    from hf_cod.scoring.layer_scores import LayerScores

DEFAULT_SPARSITY = 0.5
# The cheapest score that was better than uniform in each cell of the table (3 methods x 50, 60, 70 %); owl was worse
# in one.
DEFAULT_SCORE = "angular"


@dataclass
class PruneOptions(SpreadSettings, PlanSearchSettings, PartSettings):
    """Settings of pruning, and of samples."""

    method: str = as_in(PruneSettings, "method")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score of layers; layers with a higher score lose fewer weights: {', '.join(SCORES)}; default: "
            f"{DEFAULT_SCORE}, or owl with --threshold or --per-module"
        },
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": f"share of zeros in the layers' matrices, 0 to 1; default: {DEFAULT_SPARSITY}, or as --pattern "
            "requires"
        },
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": "2:4 keeps 2 of each 4 adjacent weights in all layers; N:8 keeps N of each 8, N by the layer's "
            "score; default: no pattern"
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        super().__post_init__()
        PartSettings.__post_init__(self)
        self.check_search(("score", "spread", "pattern", "include", "exclude", *options_of(self, "owl")[:2]))
        PruneSettings(method=self.method)
        check_names(self)
        if self.score is None:
            self.score = DefaultName(self.implied_score or DEFAULT_SCORE)
        check_choice("score", self.score, SCORES)
        check_parts(self)
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a share in 0..1, got {self.sparsity}")
        if self.fixed and (self.sparsity is not None or self.spread is not None):
            raise ValueError(f"pattern: expected no sparsity or spread with {self.pattern}, which determines them")
        if self.fixed:
            check_effect(self, ["granularity"], f"pattern {self.pattern}, which is the same for all")
        else:
            self.check_spread()

    @property
    def fixed(self) -> str | None:
        """The pattern if it is the same for all layers, else None."""
        if self.pattern is None or self.group is not None:
            return None
        from hf_cod.compression.pruning.targets import parse_pattern

        parse_pattern(self.pattern)
        return self.pattern

    @property
    def group(self) -> int | None:
        """The M of N:M if each layer has its own N, else None."""
        found = re.fullmatch(r"N:(\d+)", self.pattern or "")
        return int(found[1]) if found else None

    @property
    def budget(self) -> float:
        """The sparsity over all layers together."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def allocate(
        self, scores: LayerScores, weights: Sequence[int] | None = None, experts: ExpertScores | None = None
    ) -> LayerAllocation:
        """The sparsity of each layer, and of each expert if these have scores; `weights` are the numbers of those to
        prune in each layer, by default all.
        """
        from hf_cod.scoring.allocation import allocate

        more: dict[str, Any] = {"layer_parameters": weights, "expert_scores": experts}
        return allocate(scores, "sparsity", self.budget, self.spread, group=self.group, **more)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [LimitedModelSettings, TextSettings, PruneOptions, RecoveryOptions, CompressionOutput],
        prog="hf-cod prune",
        description="Sets weights of the layers' matrices to zero, more in less important layers, and writes a model "
        "that from_pretrained loads. After an interruption the same command resumes. The input model is never changed. "
        "Zeros alone do not make a model faster; see hf-cod pack.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, recovery, files, rest = make_parser().parse(arguments)
    settings.check_scored(files.scores, f"pattern {settings.fixed}" if settings.fixed else None)
    if recovery.recover_steps:
        from hf_cod.training.runs.new_adapters import require_peft

        require_peft("recover_steps")
    from hf_cod.cli.compression import compress

    return compress(Prune(settings, recovery), rest.model, loading, text, files)


class Prune(Step):
    """Pruning by a plan of the sparsity of layers, or by one pattern for all layers."""

    command, done = "prune", "pruned"
    earlier: ClassVar[dict[str, str]] = {"recover_steps": "recover"}

    def __init__(self, settings: PruneOptions, recovery: RecoveryOptions) -> None:
        super().__init__(settings)
        self.recovery = recovery
        self._experts: ExpertScores | None = None

    def identity(self) -> Any:
        """The settings, including those of recovery."""
        return [super().identity(), self.earlier_names(self.recovery)]

    def copies(self) -> Copies:
        """Those of the method; scores of outliers and of magnitudes take more than Wanda."""
        from hf_cod.layers.memory_limit import SCORED, Copies

        return {"magnitude": SCORED, "sparsegpt": Copies(14, products=True)}.get(self.settings.method, Copies(12))

    def in_memory(self) -> str | None:
        """Training requires the weights."""
        return "recover_steps" if self.recovery.recover_steps else super().in_memory()

    def disk_share(self) -> float:
        """Zeros are stored in the same format as other weights."""
        return 1.0

    def check(self, work: Work) -> None:
        """Checks that weights can be written, and that rows consist of complete groups of M."""
        from hf_cod.compression.pruning.methods import check_pattern
        from hf_cod.compression.pruning.targets import parse_pattern
        from hf_cod.layers.checks import check_writable
        from hf_cod.layers.module_choice import choose_modules

        stack = choose_modules(work.stack, self.settings).stack
        check_writable(stack, in_files=True)
        M = self.settings.group or (parse_pattern(self.settings.fixed)[1] if self.settings.fixed else None)
        if M is not None:
            check_pattern(stack, M)

    def plan(self, work: Work) -> LayerAllocation | str:
        """An allocation by score, or the pattern."""
        if self.settings.fixed:
            return self.settings.fixed
        if self.settings.search:
            return work.search("sparsity", self.settings.budget, pruner=self._pruner)
        chosen: dict[str, Any] = {}
        if 0 < self.settings.budget < 1:
            chosen["target"] = self.settings.budget
        chosen["pruner"] = self._pruner
        try:
            scores = work.score(str(self.settings.score), **chosen)
        except ValueError as error:
            if not isinstance(self.settings.score, DefaultName) or not str(error).startswith("model: "):
                raise
            raise ValueError(f"{error}; --score uniform requires no measurement of layers") from error
        if self.settings.experts is not None:
            self._experts = work.score_experts(self.settings.experts)
        weights = self._weights(work.stack) if given_names(self.settings) else None
        return self.settings.allocate(scores, weights, self._experts)

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """The same sparsity for all layers."""
        from hf_cod.scoring.methods import score_layers

        alike = score_layers(work.model, method="uniform", layers_path=self.settings.layers_path)
        return uniform_baseline(plan, self.settings, alike if self.settings.search else work.scores)

    def apply(self, work: Work, plan: Any) -> RunReport:
        """Prunes the matrices."""
        from hf_cod.compression.pruning.pruner import prune

        more = {**given_names(self.settings), **work.options}
        return prune(work.model, plan, self.settings.method, batches=work.calibration, name=work.name, **more)

    def last_words(self) -> list[str]:
        """What makes the model smaller."""
        return ["Zeros are stored like other weights; hf-cod pack makes the model smaller."]

    @property
    def trained(self) -> str | None:
        """The key "recovered", if recovery is requested."""
        return "recovered" if self.recovery.recover_steps else None

    def train(self, work: Work) -> None:
        """Trains with LoRA; zeros are kept."""
        from hf_cod.training.healing.recovery import recover

        recover(
            work.model,
            work.calibration,
            self.recovery.recover_steps,
            rank=self.recovery.recover_rank,
            learning_rate=self.recovery.recover_learning_rate,
            seed=self.settings.seed,
            layers_path=self.settings.layers_path,
            show_progress=True,
        )

    @property
    def _pruner(self) -> str:
        """The method by which plans are compared; SparseGPT, which is expensive to evaluate, is replaced by Wanda."""
        return self.settings.method if self.settings.method in PRUNERS else "wanda"

    def files(self, plan: Any) -> dict[str, Any]:
        """The allocation, if there is one, and the scores of experts by which it was made."""
        if isinstance(plan, str):
            return {}
        return {"allocation.json": plan, **({"expert_scores.json": self._experts} if self._experts else {})}

    def measure(self, saved: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Sparsity of the saved model."""
        from hf_cod.compression.pruning.methods import measure_sparsity
        from hf_cod.layers.module_choice import choose_modules

        return measure_sparsity(choose_modules(saved, self.settings).stack)

    def _weights(self, stack: DecoderLayers) -> list[int]:
        """The number of weights in each layer's chosen matrices."""
        from hf_cod.layers.module_choice import choose_modules

        excluded = choose_modules(stack, self.settings).excluded
        left = {index: 0 for index in range(len(stack))}
        for name, weights in excluded.items():
            left[stack.index_of(name) or 0] += weights
        return [stack.count_weights(index) - weights for index, weights in left.items()]

    def told(self, plan: Any) -> dict[str, Any]:
        """The settings of recovery; a plan without scores has none."""
        unscored = {"score": None if self.settings.fixed else "search"}
        return {**asdict(self.recovery), **(unscored if self.settings.fixed or self.settings.search else {})}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """The share of zeros, and the search for the plan."""
        from hf_cod.scoring.search_results import search_sentences

        weights, found = sum(report.layers["parameters"]), report.results
        zeros = f"{found['sparsity']:.2%} of {weights:,} weights in the matrices of the saved model are zero."
        return [zeros, *search_sentences(found.get("search", {}))]
