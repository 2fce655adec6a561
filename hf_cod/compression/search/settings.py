"""Settings of `search_plan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, as_in, check_choice, check_least
from hf_cod.scoring.settings import CODEBOOK, GRANULARITIES, PRUNERS, ScoreSettings

KINDS: dict[str, str] = {
    "sparsity": "share of zeros",
    "bits": "stored bits per weight, scales included, of matrices in 3 and 4 bits",
}
# Those of `prune` that no forward pass of the pruned model is required for.
ZEROS = [name for name in PRUNERS if name != CODEBOOK]
DEFAULT_PASSES = 2000


@checked
@dataclass
class SearchSettings:
    """The budget of the plan, and that of the search."""

    kind: str = field(default="sparsity", metadata={"help": "quantity of the budget", "choices": list(KINDS)})
    budget: float = field(default=0.5, metadata={"help": "mean of the plan, weighted by parameters"})
    granularity: str = as_in(ScoreSettings, "granularity", default="module")
    pruner: str = field(
        default="wanda", metadata={"help": "how weights are set to zero during the search", "choices": ZEROS}
    )
    passes: int = field(
        default=DEFAULT_PASSES,
        metadata={
            "help": "cost of the search: maximum number of forward passes of one sample through a compressed model"
        },
    )
    offspring: int = field(default=16, metadata={"help": "number of changed plans of a generation"})
    seed: int = field(default=0, metadata={"help": "seed of all random choices"})

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("pruner", self.pruner, ZEROS)
        check_least(self, passes=1, offspring=1)
        if self.kind == "sparsity" and not 0 < self.budget < 1:
            raise ValueError(f"budget: expected a sparsity between 0 and 1, got {self.budget}")


class SearchFields(SampleFields, total=False):
    """Fields of `SearchSettings`, and of samples, that `search_plan` takes by name."""

    granularity: str
    pruner: str
    passes: int
    offspring: int
