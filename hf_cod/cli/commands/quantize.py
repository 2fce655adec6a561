"""hf-cod quantize MODEL: three and four bits per weight, four in more important layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.plan_settings import PlanSearchSettings
from hf_cod.cli.settings import CompressionOutput, CompressionSettings, LimitedModelSettings
from hf_cod.cli.step import Step
from hf_cod.compression.quantization.settings import QuantizeSettings, StorageSettings, check_bits, check_mixture
from hf_cod.functional.bits import BITS
from hf_cod.io.module_names import Names, check_names, given_names
from hf_cod.io.settings import DefaultName, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import CODEBOOK, EXPERT, AllocationSettings, ExpertScoreSettings, options_of
from hf_cod.scoring.settings import EXPERT_METHODS as EXPERTS
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.layers.memory_limit import Copies
    from hf_cod.layers.stack import DecoderLayers
    from hf_cod.scoring.allocation import LayerAllocation
    from hf_cod.scoring.expert_scores import ExpertScores

# Method of rounding -> description.
ROUNDINGS = {
    "compensated": "the error of each rounded weight is compensated by the weights that are still to be rounded (GPTQ)",
    "weighted": "scales with the least error of the outputs on the calibration text",
    "nearest": "requires no calibration text; much higher perplexity at 3 bits",
}

# In the table of mixtures, compared with equal scores (earlier layers first): with compensation owl is the best of all
# scores (61.3 against 64.0); with nearest rounding owl is worse (91.3 against 89.2), and angular is the best.
DEFAULT_SCORE, BY_VALUE = "owl", "angular"


@dataclass
class QuantizeOptions(CompressionSettings, PlanSearchSettings, StorageSettings):
    """Settings of quantization, and of samples."""

    bits: float = as_in(QuantizeSettings, "bits")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score of layers; those with the highest scores get four bits: {', '.join(SCORES)}; default: "
            f"{DEFAULT_SCORE}, or {BY_VALUE} with --rounding weighted or nearest"
        },
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "score of single experts of a mixture of experts: "
            + ", ".join(EXPERTS)
            + ". What all tokens enter (attention, shared experts) gets four bits first, then the experts with the "
            f"highest scores of all layers (default: experts get the bits of their layer; "
            f"{ExpertScoreSettings().method} with granularity expert)",
            "choices": list(EXPERTS),
        },
    )
    granularity: str = as_in(AllocationSettings, "granularity", default="layer")
    rounding: str = field(
        default="compensated",
        metadata={
            "help": "; ".join(f"{name}: {text}" for name, text in ROUNDINGS.items()),
            "choices": list(ROUNDINGS),
        },
    )
    skip: list[str] = as_in(QuantizeSettings, "skip")  # noqa: RUF009 - as_in makes a field
    include: Names = as_in(QuantizeSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(QuantizeSettings, "exclude")  # noqa: RUF009 - as_in makes a field
    baseline: bool = field(
        default=True,
        metadata={"help": "also measure all layers at 3 bits and all at 4 bits, for comparison; takes 3 x the time"},
    )
    force: bool = field(
        default=False,
        metadata={
            "help": "apply the mixture of 3 and 4 bits even if all layers at 3 bits have a lower perplexity; default: "
            "apply the one with the lower perplexity. With --no-baseline the mixture is always applied"
        },
    )
    explain: bool = field(default=False, metadata={"help": "print the score and the bits of each layer"})

    def __post_init__(self) -> None:
        CompressionSettings.__post_init__(self)
        StorageSettings.__post_init__(self)
        check_bits(self.bits)
        unused = ("score", "experts", "skip", "include", "exclude", "block", "double_quant", "explain")
        self.check_search((*unused, *options_of(self, "owl")[:2]))
        if self.search and not self.mixed:
            raise ValueError(f"search: expected bits between 3 and 4, got {self.bits:g}, which is the same for all")
        check_names(self)
        check_mixture(self.bits, self)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.score is None:
            default = DEFAULT_SCORE if self.rounding == "compensated" else BY_VALUE
            self.score = DefaultName(self.implied_score or default)
        check_choice("score", self.score, SCORES)
        if self.granularity == EXPERT and self.experts is None:
            self.experts = DefaultName(ExpertScoreSettings().method)
        if self.experts is not None:
            check_choice("experts", self.experts, EXPERTS)
            if self.granularity not in ("layer", EXPERT):
                raise ValueError(f"experts: expected none with granularity {self.granularity}, got {self.experts}")
            if not self.mixed:
                raise ValueError(
                    f"experts: expected none with bits {self.bits:g}, which uses no scores, got {self.experts}"
                )

    @property
    def mixed(self) -> bool:
        """Whether some matrices get three bits and some four."""
        return self.bits not in BITS


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [LimitedModelSettings, TextSettings, QuantizeOptions, CompressionOutput],
        prog="hf-cod quantize",
        description="Quantizes the layers' matrices to three and four bits per weight, four in more important layers, "
        "and writes a model that from_pretrained loads if hf_cod is imported. After an interruption the same command "
        "resumes. The input model is never changed.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    settings.check_scored(files.scores, None if settings.mixed else f"bits {settings.bits:g}")
    import hf_cod.compression.quantization.bnb  # noqa: F401 - its absence is reported before any work
    from hf_cod.cli.compression import compress

    return compress(Quantize(settings), rest.model, loading, text, files)


class Quantize(Step):
    """Three and four bits by scores of layers; a plan has the bits of each layer, a baseline one value for all."""

    command, done, rival = "quantize", "quantized", "three"

    def identity(self) -> Any:
        """The settings; without `force` and `experts`, which version 0.1 did not have, those of that version."""
        return {name: value for name, value in super().identity().items() if name not in ("force", "experts") or value}

    def __init__(self, settings: QuantizeOptions) -> None:
        super().__init__(settings)
        self._planned: LayerAllocation | None = None
        self._experts: ExpertScores | None = None

    def copies(self) -> Copies:
        """Those of the rounding."""
        from hf_cod.layers.memory_limit import Copies

        return Copies(14, products=True) if self.settings.rounding == "compensated" else Copies(14)

    def check(self, work: Work) -> None:
        """Checks that the matrices can be replaced, that a mixture with these bits exists for their shapes, and that it
        can be loaded again.
        """
        from hf_cod.compression.quantization.plan import plan_bits
        from hf_cod.layers.checks import check_writable
        from hf_cod.models.stored_config import check_storable

        check_storable(work.model)
        stack = self._stack(work)
        check_writable(stack, in_files=True, factors=True)
        plan_bits(stack, self.settings.bits, self._storage(), None, self.settings.skip)

    def plan(self, work: Work) -> LayerAllocation:
        """The bits of each layer; layers are scored only if they get different bits."""
        from hf_cod.compression.quantization.plan import as_allocation, plan_bits

        chosen = self.settings
        if chosen.search:
            self._planned = work.search("bits", chosen.bits)
            return self._planned
        if chosen.mixed:
            tried = "pruner" in SCORES[str(chosen.score)].settings
            work.score(str(chosen.score), **({"pruner": CODEBOOK, "target": chosen.bits} if tried else {}))
        if chosen.experts is not None:
            self._experts = work.score_experts(chosen.experts)
        if chosen.explain:
            from hf_cod.cli.explained import explain_bits

            explain_bits(self._stack(work), chosen, work.scores, self._experts)
        scores = work.scores if chosen.mixed else None
        stack, storage = self._stack(work), self._storage()
        plan = plan_bits(stack, chosen.bits, storage, scores, chosen.skip, expert_scores=self._experts)
        method = scores.method if scores else "uniform"
        granularity = scores.granularity if scores else "layer"
        self._planned = as_allocation(work.stack, plan, self._storage(), method, granularity)
        return self._planned

    def baselines(self, work: Work, plan: LayerAllocation) -> dict[str, Any]:
        """All layers at three bits, and all at four."""
        return {"three": 3.0, "four": 4.0} if self.settings.baseline and self.settings.mixed else {}

    def further_scores(self) -> dict[str, str]:
        """The score of experts."""
        return {} if self.settings.experts is None else {"experts": self.settings.experts}

    def apply(self, work: Work, plan: LayerAllocation | float) -> RunReport:
        """Quantizes in place, by the chosen method of rounding."""
        from hf_cod.analysis.statistics.layer_statistics import collect_statistics
        from hf_cod.compression.quantization.config import OwlBnbConfig
        from hf_cod.compression.quantization.quantize import quantize

        path, more = self.settings.layers_path, dict[str, Any](name=work.name)
        bits: dict[str, Any] = {"bits": plan}
        if not isinstance(plan, float):
            bits = {"allocation": plan, "expert_scores": self._experts}
        config = OwlBnbConfig(skip=self.settings.skip, **given_names(self.settings), **bits, **asdict(self._storage()))
        if self.settings.rounding == "weighted":
            statistics = collect_statistics(work.model, work.calibration, layers_path=path, show_progress=True)
            config.statistics = statistics
        elif self.settings.rounding == "compensated":
            more["batches"] = work.calibration
        return quantize(work.model, config, **more, **work.options)

    def _stack(self, work: Work) -> DecoderLayers:
        """The layers, restricted to the chosen matrices."""
        from hf_cod.layers.module_choice import choose_modules

        return choose_modules(work.stack, self.settings).stack

    def _storage(self) -> StorageSettings:
        return StorageSettings(**{f.name: getattr(self.settings, f.name) for f in fields(StorageSettings)})

    def told(self, plan: LayerAllocation | float) -> dict[str, Any]:
        """All layers at the same bits use no score."""
        if self.settings.search:
            return {"score": "search"}
        return {} if self.settings.mixed else {"score": None}

    def files(self, plan: LayerAllocation | float) -> dict[str, Any]:
        """The bits of each layer, and the scores of experts by which they were chosen."""
        if isinstance(plan, float):
            assert self._planned is not None
            alike = [plan] * len(self._planned.values)
            plan = replace(self._planned, budget=plan, values=alike, method="uniform", granularity="layer", modules={})
        scores = {} if self._experts is None else {"expert_scores.json": self._experts}
        return {"allocation.json": plan, **scores}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """The summary, with the perplexities of all layers at three and at four bits."""
        from hf_cod.cli.closing import does_harm
        from hf_cod.io.report import format_number

        found, ends = report.results["perplexity"], []
        if found.get("three") is not None:
            three, four = (format_number(found[name]) for name in ("three", "four"))
            ends.append(f"Perplexity with all layers at 3 bits: {three}; at 4 bits: {four}.")
            if "fallback" in report.results:
                ends.append("All layers have 3 bits, which had the lower perplexity, with less memory; see the note.")
            elif does_harm(found["three"], found["quantized"]):
                ends.append("On these samples 3 bits for all layers (--bits 3) are better, with less memory.")
        return [*report.summary, *ends]

    def last_words(self) -> list[str]:
        """How to load the model."""
        from hf_cod.cli.closing import TO_LOAD

        return [TO_LOAD]
