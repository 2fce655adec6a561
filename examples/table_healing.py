"""--heal of the tables of rank, width and depth: recovery of each model by training to match the intact model."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from owl_table import two_texts

from hf_cod import HealSettings, heal, perplexity
from hf_cod.io.packing import pack
from hf_cod.io.text import Batch
from hf_cod.training.runs.methods import METHODS


def add_healing(parser: argparse.ArgumentParser) -> None:
    """The options of healing."""
    parser.add_argument("--heal", help="tokens of the text to heal each model on, such as 2M; default: none")
    parser.add_argument("--heal-scores", nargs="*", help="scores, or criteria, whose models are healed; default: all")
    parser.add_argument("--heal-method", default="full", choices=list(METHODS), help="training method")
    parser.add_argument("--heal-rate", type=float, help="peak learning rate; default: the method's")
    parser.add_argument("--heal-batch", type=int, default=16, help="samples per optimizer step")
    parser.add_argument("--heal-bf16", action="store_true", help="heal under bfloat16 autocast")


class Healing:
    """Heals the models of a table on the tuning text; false if none is to be healed.

    Args:
        teacher: the intact model.
        tokenizer: the tokenizer of all models.
        arguments: the arguments of the command line.
    """

    def __init__(self, teacher: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self.teacher, self.tokens, self.scores = teacher, arguments.heal, arguments.heal_scores
        if not self:
            return
        self.settings = HealSettings(
            arguments.heal_method,
            learning_rate=arguments.heal_rate,
            tokens=arguments.heal,
            batch_size=arguments.heal_batch,
            micro_batch_size=arguments.heal_batch,
            sequence_length=arguments.sequence_length,
            bf16=arguments.heal_bf16,
            eval_samples=4,  # the table measures by itself
        )
        self.windows = pack(tokenizer, [two_texts(arguments)[0]], arguments.sequence_length)

    def __bool__(self) -> bool:
        return self.tokens is not None

    def asks(self, score: str) -> bool:
        """Whether models of this score are to be healed."""
        return bool(self) and (self.scores is None or score in self.scores)

    def key(self, cell: str) -> str:
        """Key in the journal for the perplexity of a cell after healing."""
        if not self:
            return f"{cell} healed"
        own, dtype = self.settings, " in bfloat16" if self.settings.bf16 else ""
        return f"{cell} healed on {self.tokens} by {own.method} at {own.rate:g}, {own.batch_size} a step{dtype}"

    def perplexity(self, student: Any, batches: Sequence[Batch]) -> float:
        """Heals the student in place, and measures it."""
        heal(student, self.teacher, self.windows, self.settings)
        return perplexity(student, batches)


def recovered(row: dict[str, Any], intact: float) -> float | None:
    """The recovered share of the lost log-perplexity; None if the cell was not healed, or nothing was lost."""
    if row["healed"] is None or row["perplexity"] <= intact:
        return None
    return math.log(row["perplexity"] / row["healed"]) / math.log(row["perplexity"] / intact)


def describe_healing(rows: Sequence[dict[str, Any]], intact: float, healing: Healing) -> list[str]:
    """A sentence on the recovered share over all cells."""
    shares = [share for row in rows if (share := recovered(row, intact)) is not None]
    if not shares:
        return []
    return [
        f"After the arrow: healed on {healing.tokens} tokens by {healing.settings.method} at "
        f"{healing.settings.rate:g}. Recovered share of the lost log-perplexity: {statistics.median(shares):.0%} "
        f"(median), {min(shares):.0%} (minimum).",
        "",
    ]
