"""Settings of `plan_fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.settings import SampleFields, check_least

# Kind of a budget -> its unit.
KINDS = {
    "memory": "bytes of the full model",
    "parameter_share": "share of the weights of the layers' matrices",
    "bits": "stored bits for each weight of the layers' matrices",
}
# Knob -> its effect, in the order of application.
KNOBS = {
    "depth": "removes layers",
    "experts": "removes experts of a mixture",
    "width": "removes attention heads and MLP channels",
    "rank": "replaces matrices by products of two thin factors",
    "sparsity": "sets weights to zero, and stores matrices without the zeros",
    "bits": "stores weights in three and four bits",
}


@renamed(verify="n_verified")
@checked
@dataclass
class FitSettings:
    """The knobs to choose from, the number of combinations to measure, and of samples to measure them on."""

    knobs: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "compression methods to choose from. "
            + "; ".join(f"{name}: {effect}" for name, effect in KNOBS.items())
            + "; default: all that apply to the model and the budget",
            "nargs": "*",
        },
    )
    n_verified: int = field(
        default=3,
        metadata={
            "help": "number of combinations of methods to measure, in addition to each method alone; each takes the "
            "time of applying its methods once; 0: the plan is a single method"
        },
    )
    tuning_samples: int = field(
        default=16, metadata={"help": "samples for choosing the plan, in addition to --max-samples"}
    )
    verify = OldAttribute("n_verified")

    def __post_init__(self) -> None:
        unknown = [knob for knob in self.knobs or () if knob not in KNOBS]
        if unknown:
            raise ValueError(f"knobs: expected some of {', '.join(KNOBS)}, got {unknown[0]!r}")
        check_least(self, n_verified=0, tuning_samples=1)


class FitFields(SampleFields, total=False):
    """Fields of `FitSettings`, and of samples, that `plan_fit` takes by name."""

    knobs: Sequence[str] | None
    n_verified: int
    tuning_samples: int
