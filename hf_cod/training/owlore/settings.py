"""Settings of `OwLoreAdamW`, `LayerSampler` and `lora_ranks`; the help texts feed the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.module_names import ModuleFields, ModuleSettings, Names, check_names
from hf_cod.io.settings import Default, as_in, check_choice, check_least, check_number

DEFAULT_FLOOR = 0.2
DEFAULT_LR = 3e-4
DEFAULT_SPREAD = 0.5
MOST_RANK = 100_000  # above the width of any model; each rank up to it is a candidate
DESELECTED = ("drop", "keep", "offload")
ROUNDINGS = ("stochastic", "nearest")
MOMENTS = ("float32", "8bit")


@checked
@dataclass
class OwLoreSettings:
    """Sampling of layers and low-rank training of them.

    Defaults are the paper's for LLaMA2-7B (arXiv 2405.18380, appendix A), except for the floor.
    """

    n_active: int = field(
        default=Default(5),
        metadata={
            "help": "number of layers that are trained at a time (gamma in the paper); the default is lowered to the "
            "number of layers of the model if that is smaller"
        },
    )
    interval: int = field(
        default=50, metadata={"help": "optimizer steps after which layers are sampled again (K in the paper)"}
    )
    rank: int | None = field(
        default=Default(128),
        metadata={
            "help": "rank to which the gradients of matrices are projected (GaLore); 0 or None: full rank; the default "
            "is lowered to the width of the layers' matrices if that is smaller"
        },
    )
    scale: float = field(
        default=1.0, metadata={"help": "factor by which projected updates are multiplied (alpha of GaLore)"}
    )
    floor: float = field(
        default=DEFAULT_FLOOR,
        metadata={
            "help": "share of the sampling probability that all layers get equally, 0 to 1; the rest follows the "
            "scores. Above 0, each layer can be sampled; 1: all layers are equally likely, as in LISA"
        },
    )
    deselected: str = field(
        default="drop",
        metadata={
            "help": "drop, keep or offload (to the CPU) the optimizer state of layers that are no longer sampled",
            "choices": list(DESELECTED),
        },
    )
    train_embeddings: bool = field(
        default=False, metadata={"help": "also train embeddings and head, in full rank, in every step (as LISA does)"}
    )
    moments: str = field(
        default="float32",
        metadata={
            "help": "format of Adam's moments: float32 or 8bit (requires bitsandbytes)",
            "choices": list(MOMENTS),
        },
    )
    rounding: str = field(
        default="stochastic",
        metadata={
            "help": "rounding of updated bfloat16 weights: stochastic keeps small updates on average; nearest loses "
            "updates below 1/512 of a weight",
            "choices": list(ROUNDINGS),
        },
    )
    fused: bool = field(
        default=False,
        metadata={
            "help": "update each weight inside the backward pass and free its gradient at once. Requires no gradient "
            "accumulation, no clipping (max_grad_norm 0), no loss scaling, and one process"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of all random choices"})
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        check_names(self)
        self.rank = self.rank or None
        check_least(self, n_active=1, interval=1, rank=1)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a finite number above 0, got {self.scale}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: expected a share between 0 and 1, got {self.floor}")
        for name, allowed in (("deselected", DESELECTED), ("rounding", ROUNDINGS), ("moments", MOMENTS)):
            check_choice(name, getattr(self, name), allowed)


class OwLoreFields(ModuleFields, total=False):
    """Fields of `OwLoreSettings` that `OwLoreAdamW` takes by name."""

    n_active: int
    interval: int
    rank: int | None
    scale: float
    floor: float
    deselected: str
    train_embeddings: bool
    moments: str
    rounding: str
    fused: bool
    seed: int


@checked
@dataclass
class SamplerSettings:
    """Sampling of layers; the number of layers limits `n_active`."""

    n_active: int = as_in(OwLoreSettings, "n_active")
    seed: int = as_in(OwLoreSettings, "seed")
    floor: float = as_in(OwLoreSettings, "floor")

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: expected a share between 0 and 1, got {self.floor}")


@checked
@dataclass
class LoraRankSettings:
    """Ranks of adapters by scores."""

    r: int = field(default=16, metadata={"help": "mean rank"})
    relative_spread: float = field(
        default=DEFAULT_SPREAD, metadata={"help": "half the width of the interval of ranks, as a share of r"}
    )

    def __post_init__(self) -> None:
        check_least(self, r=1)
        if self.r > MOST_RANK:
            raise ValueError(f"r: expected at most {MOST_RANK}, got {self.r}")
        if not 0 <= self.relative_spread <= 1:
            raise ValueError(f"relative_spread: expected a share between 0 and 1, got {self.relative_spread}")


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises ValueError if a hyperparameter is out of range."""
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        check_number(name, value, 0)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
