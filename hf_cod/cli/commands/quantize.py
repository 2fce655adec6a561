"""hf-cod quantize MODEL: three and four bits a weight, four in the layers that matter more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser
from hf_cod.cli.settings import CompressionOutput, CompressionSettings
from hf_cod.cli.step import Step
from hf_cod.compression.quantization.settings import QuantizeSettings, StorageSettings, check_bits
from hf_cod.functional.bits import BITS
from hf_cod.io.settings import ModelSettings, TextSettings, as_in, check_choice
from hf_cod.scoring.settings import CODEBOOK
from hf_cod.scoring.settings import METHODS as SCORES

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.scoring.allocation import LayerAllocation

# Way of rounding -> what it looks at.
ROUNDINGS = {
    "compensated": "error compensation by the weights not yet rounded (GPTQ)",
    "weighted": "scales by what errors do to outputs",
    "nearest": "without a look at the text, and far worse at 3 bits",
}

# Against earlier layers first, which layers that are all alike get, in the table of mixtures: with compensation owl is
# the best of all scores (61.3 against 64.0); to the nearest it lost (91.3 against 89.2), and angular is the best.
DEFAULT_SCORE, BY_VALUE = "owl", "angular"
# More than any whole block takes: four bits, and a scale of 32 bits for each 32 weights. What a model's shapes allow is
# known once it is loaded.
MOST_BITS = 5.0
SCALE_BITS, TOLERANCE = 8, 0.02  # of a scale that is stored in few bits; of a figure that was rounded


@dataclass
class QuantizeOptions(CompressionSettings, StorageSettings):
    """What is quantized, and on which samples."""

    bits: float = as_in(QuantizeSettings, "bits")
    score: str | None = field(
        default=None,
        metadata={
            "help": f"score that decides which layers get four bits: {', '.join(SCORES)}; default: {DEFAULT_SCORE}, "
            f"{BY_VALUE} where errors are not compensated"
        },
    )
    rounding: str = field(
        default="compensated",
        metadata={
            "help": "; ".join(f"{name}: {text}" for name, text in ROUNDINGS.items()),
            "choices": list(ROUNDINGS),
        },
    )
    skip: list[str] = as_in(QuantizeSettings, "skip")  # noqa: RUF009 - as_in makes a field
    baseline: bool = field(
        default=True,
        metadata={"help": "also quantize all layers to 3 and to 4 bits, to see where the mixture lies; 3 x the time"},
    )
    explain: bool = field(default=False, metadata={"help": "print who gets how many bits, and why"})

    def __post_init__(self) -> None:
        CompressionSettings.__post_init__(self)
        StorageSettings.__post_init__(self)
        check_bits(self.bits)
        least = min(BITS) + (SCALE_BITS if self.double_quant else 32) / self.block  # of whole blocks; none takes less
        if self.bits > MOST_BITS or min(BITS) < self.bits < least - TOLERANCE:
            raise ValueError(
                f"bits: expected 3, 4, or stored bits a weight, scales included, from {least:.2f} to {least + 1:.2f}, "
                f"got {self.bits:g}"
            )
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.score is None:
            self.score = DEFAULT_SCORE if self.rounding == "compensated" or self.of_owl else BY_VALUE
        check_choice("score", self.score, SCORES)

    @property
    def mixed(self) -> bool:
        """Whether some matrices get three bits and some four."""
        return self.bits not in BITS


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, QuantizeOptions, CompressionOutput],
        prog="hf-cod quantize",
        description="Stores the layers' matrices in three and four bits a weight, four in layers that matter more, and "
        "writes a model that from_pretrained loads wherever hf_cod is imported. Interrupted, the same command resumes. "
        "The model itself is never touched.",
    )
    parser.add_argument("model", help="Hub id, directory, or GGUF file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, files, rest = make_parser().parse(arguments)
    import hf_cod.compression.quantization.bnb  # noqa: F401 - its absence is reported before any work
    from hf_cod.cli.compression import compress

    return compress(Quantize(settings), rest.model, loading, text, files)


class Quantize(Step):
    """Three and four bits, by the scores of layers; a plan is the bits of each layer, a baseline those of all."""

    command, done = "quantize", "quantized"

    def check(self, work: Work) -> None:
        """Bits that no mixture has in this model's shapes."""
        from hf_cod.compression.quantization.plan import plan_bits

        plan_bits(work.stack, self.settings.bits, self._storage(), None, self.settings.skip)

    def plan(self, work: Work) -> LayerAllocation:
        """Bits, once layers are scored that are to differ; equal ones need no scores."""
        from hf_cod.compression.quantization.plan import as_allocation, plan_bits

        chosen = self.settings
        if chosen.mixed:
            tried = chosen.score in ("sensitivity", "auto")
            work.score(str(chosen.score), **({"pruner": CODEBOOK, "target": chosen.bits} if tried else {}))
        if chosen.explain:
            from hf_cod.cli.explained import explain_bits

            explain_bits(work.stack, chosen, work.scores)
        scores = work.scores if chosen.mixed else None
        plan = plan_bits(work.stack, chosen.bits, self._storage(), scores, chosen.skip)
        return as_allocation(work.stack, plan, self._storage(), scores.method if scores else "uniform")

    def baselines(self, work: Work, plan: LayerAllocation) -> dict[str, Any]:
        """All layers in three bits, and all in four."""
        return {"three": 3.0, "four": 4.0} if self.settings.baseline and self.settings.mixed else {}

    def apply(self, work: Work, plan: LayerAllocation | float) -> RunReport:
        """Quantizes in place, by the way of rounding that was asked for."""
        from hf_cod.analysis.statistics.layer_statistics import collect_statistics
        from hf_cod.compression.quantization.config import OwlBnbConfig
        from hf_cod.compression.quantization.quantize import quantize

        path, more = self.settings.layers_path, dict[str, Any](name=work.name)
        bits: dict[str, Any] = {"bits": plan} if isinstance(plan, float) else {"allocation": plan}
        config = OwlBnbConfig(skip=self.settings.skip, **bits, **asdict(self._storage()))
        if self.settings.rounding == "weighted":
            statistics = collect_statistics(work.model, work.calibration, layers_path=path, show_progress=True)
            config.statistics = statistics
        elif self.settings.rounding == "compensated":
            more["batches"] = work.calibration
        return quantize(work.model, config, **more, **work.options)

    def _storage(self) -> StorageSettings:
        return StorageSettings(**{f.name: getattr(self.settings, f.name) for f in fields(StorageSettings)})

    def files(self, plan: LayerAllocation) -> dict[str, Any]:
        """The bits of each layer."""
        return {"allocation.json": plan}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """Where the mixture lies between its ends."""
        from hf_cod.cli.closing import does_harm
        from hf_cod.io.report import format_number

        found, ends = report.results["perplexity"], []
        if found.get("three") is not None:
            three, four = (format_number(found[name]) for name in ("three", "four"))
            ends.append(f"Perplexity with all layers in 3 bits: {three}; in 4 bits: {four}.")
            if does_harm(found["three"], found["quantized"]):
                ends.append("So on these samples three bits for all layers lose less, in less memory: --bits 3.")
        return [*report.summary, *ends]

    def last_words(self) -> list[str]:
        """How to load it."""
        return ["To load it, import hf_cod before from_pretrained."]
