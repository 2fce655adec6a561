"""Recipes of pre-training: the papers' settings by model size, one for a laptop, and settings that override them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.settings import TextSettings, check_choice, check_least
from hf_cod.models import CodLlamaConfig, llama_preset

WARMUP_SHARE = 0.1
FINAL_LEARNING_RATE_SHARE = 0.1  # the cosine ends here
VALID_PLACEMENTS = CodLlamaConfig.valid_placements()
PRECISIONS = ("bf16", "float32")


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the trained model, except norm placement and seed.

    Attributes:
        size: size of `llama_preset`.
        learning_rate: peak learning rate, after the warm-up.
        steps: optimizer steps.
        batch_size: sequences in one optimizer step, over all processes.
        micro_batch_size: sequences in one forward pass of one process; affects memory and speed, not the result.
        sequence_length: tokens per sequence.
        tokenizer: Hub id or directory; None to train a byte-pair encoding on the text.
        text: dataset or file; None for the embedded novel.
        text_config: configuration of the dataset.
        validation_split: split of the dataset for validation; None to hold out a share of the text.
        stream: whether text is tokenized during training, for texts that are too large to be tokenized first.
        model_fields: fields of the model's configuration that differ from those of `size`.
    """

    size: str
    learning_rate: float
    steps: int
    batch_size: int = 512
    micro_batch_size: int = 64
    sequence_length: int = 256
    tokenizer: str | None = "google-t5/t5-base"
    text: str | None = "allenai/c4"
    text_config: str | None = "en"
    validation_split: str | None = "validation"
    stream: bool = True
    model_fields: tuple[tuple[str, Any], ...] = ()

    @property
    def warmup_steps(self) -> int:
        """A tenth of the steps, as in the paper (the authors' script for 1B uses a hundredth)."""
        return max(1, round(WARMUP_SHARE * self.steps))

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return self.steps * self.batch_size * self.sequence_length


_LAPTOP_MODEL: tuple[tuple[str, Any], ...] = (
    ("hidden_size", 128),
    ("intermediate_size", 344),
    ("num_hidden_layers", 12),
    ("num_attention_heads", 2),  # heads of 64 channels, as in the 130M model
    ("max_position_embeddings", 256),
    ("vocab_size", 4096),  # small, so that the layers, not the embeddings, hold most of the parameters
    ("attn_implementation", "eager"),  # on a CPU, at 256 tokens, a third faster than PyTorch's fused attention
)

# Sun et al. 2025 (arXiv 2502.05795), section 5 and the authors' scripts: Adam without weight decay or clipping, cosine
# to a tenth. Differences: text is packed (theirs is truncated and padded at 256 tokens); weights and optimizer are
# float32 under bf16 autocast (theirs are bf16 throughout, which loses updates below 1/256 of a weight); the peak
# learning rate of "tiny", which is in no paper, was found by search.
RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        size="130M",
        learning_rate=2e-3,
        steps=5000,
        batch_size=8,
        micro_batch_size=8,
        tokenizer=None,
        text=None,
        text_config=None,
        validation_split=None,
        stream=False,
        model_fields=_LAPTOP_MODEL,
    ),
    "130M": Recipe(size="130M", learning_rate=1e-3, steps=20_000),
    "250M": Recipe(size="250M", learning_rate=1e-3, steps=40_000),
    "350M": Recipe(size="350M", learning_rate=5e-4, steps=60_000),
    "1B": Recipe(size="1B", learning_rate=5e-4, steps=100_000, micro_batch_size=16),
}


@checked
@dataclass
class PretrainSettings(TextSettings):
    """A run of pre-training: a recipe, settings that override it, and the output directory."""

    text: str | None = field(
        default=None,
        metadata={"help": "text file (.txt, .jsonl, .csv, .parquet) or dataset name; default: the preset's"},
    )
    preset: str = field(
        default="tiny", metadata={"help": f"recipe of the run: {', '.join(RECIPES)}", "choices": list(RECIPES)}
    )
    norm_placement: str = field(
        default="lns",
        metadata={
            "help": f"norm placement of the model: {', '.join(VALID_PLACEMENTS)}",
            "choices": list(VALID_PLACEMENTS),
        },
    )
    learning_rate: float | None = field(default=None, metadata={"help": "peak learning rate; default: the preset's"})
    steps: int | None = field(default=None, metadata={"help": "optimizer steps; default: the preset's"})
    batch_size: int | None = field(
        default=None, metadata={"help": "sequences per optimizer step, over all processes; default: the preset's"}
    )
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "sequences per forward pass of a process; default: the preset's"}
    )
    sequence_length: int | None = field(default=None, metadata={"help": "tokens per sequence; default: the preset's"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub id or directory; default: the preset's; the preset tiny trains one on the text"},
    )
    validation_text: str | None = field(
        default=None,
        metadata={"help": "validation text; default: the dataset's validation split, or a held-out share of the text"},
    )
    validation_samples: int = field(default=256, metadata={"help": "maximum number of validation sequences"})
    stream: bool = field(
        default=False,
        metadata={"help": "tokenize --text during training, for texts that are too large to be tokenized first"},
    )
    precision: str = field(
        default="bf16",
        metadata={"help": "bf16 (autocast over float32 weights) or float32", "choices": list(PRECISIONS)},
    )
    compile: bool = field(
        default=False,
        metadata={"help": "use torch.compile; compiling takes about a minute, which pays off after some minutes"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the weights and of the order of the text"})
    output: str | None = field(
        default=None, metadata={"help": "directory for checkpoints, model and report; default: hf-cod-pretrain-..."}
    )
    save_every: int = field(
        default=200, metadata={"help": "steps between checkpoints; an interrupted run resumes from the last one"}
    )
    evaluate_every: int = field(default=200, metadata={"help": "steps between validations"})
    diagnose_every: int = field(default=100, metadata={"help": "steps between measurements of the layers"})
    log_every: int = field(default=10, metadata={"help": "steps between logged losses"})

    def __post_init__(self) -> None:
        for name, valid in (("preset", RECIPES), ("norm_placement", VALID_PLACEMENTS), ("precision", PRECISIONS)):
            check_choice(name, getattr(self, name), valid)
        check_least(self, steps=1, batch_size=1, micro_batch_size=1, sequence_length=2, validation_samples=1)
        check_least(self, save_every=1, evaluate_every=1, diagnose_every=1, log_every=1)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a finite number above 0, got {self.learning_rate}")
        if self.stream and self.text is None and not RECIPES[self.preset].stream:
            raise ValueError(f"stream: expected --text with the preset {self.preset}, got none")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every: expected a multiple of log_every ({self.log_every}), so that a checkpoint includes all "
                f"losses up to its step, got {self.save_every}; set both"
            )
        if self.output is None:
            self.output = f"hf-cod-pretrain-{self.preset}-{self.norm_placement}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """The preset's recipe with the settings of this run that override it."""
        recipe = RECIPES[self.preset]
        named = ("learning_rate", "steps", "batch_size", "micro_batch_size", "sequence_length", "tokenizer")
        changed = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        if self.batch_size is not None and self.micro_batch_size is None:
            changed["micro_batch_size"] = min(recipe.micro_batch_size, self.batch_size)
        if self.text is not None:
            own = {"text": self.text, "text_config": self.text_config, "stream": self.stream}
            changed.update(own, validation_split=None)
        elif self.text_config is not None:
            changed["text_config"] = self.text_config
        return replace(recipe, **changed)

    def describe(self) -> dict[str, Any]:
        """All settings of the run, with those of the recipe filled in."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name != "model_fields"}
        return {**asdict(self), **recipe}


def model_config(recipe: Recipe, norm_placement: str, **fields: Any) -> CodLlamaConfig:
    """The configuration of a recipe's model.

    Args:
        recipe: the recipe.
        norm_placement: the model's norm placement.
        **fields: further fields of the configuration; they override the recipe's.
    """
    return llama_preset(recipe.size, norm_placement, **{**dict(recipe.model_fields), **fields})


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Forward passes of each process per optimizer step.

    Raises:
        ValueError: batch_size is not a multiple of micro_batch_size times processes.
    """
    together = recipe.micro_batch_size * processes
    if recipe.batch_size % together:
        raise ValueError(
            f"micro_batch_size: expected batch_size {recipe.batch_size} to be a multiple of micro_batch_size times "
            f"{processes} processes, got {recipe.micro_batch_size}"
        )
    return recipe.batch_size // together
