"""Perplexity of a factorized model: methods x scores x shares of parameters removed, with one calibration for all.

    python examples/rank_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

All settings (OWL's threshold M, lambda of each score; for auto also the score) are chosen on the first half of the
text; all reported perplexities are of the second half, or with --report-text of another text. Shares are of the
parameters of the layers' matrices. With --heal each model is then trained on the first text to match the intact model,
and measured again. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import copy
from itertools import product
from pathlib import Path
from typing import Any

from owl_table import cut_samples, markdown, table_parser
from table_healing import Healing, add_healing, describe_healing

from hf_cod import LayerAllocation, LayerScores, RankPlan, allocate, factorize, perplexity, plan_ranks, score_layers
from hf_cod.compression.low_rank.factorizer import METHODS
from hf_cod.compression.low_rank.settings import WEIGHINGS
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model

THRESHOLDS = (5.0, 10.0)
SPREADS = (0.08, 0.15)
SCORES = ("uniform", "owl", "angular", "spectrum", "fisher")
Candidate = tuple[str, float | None, float | None]
"""A score, M and lambda."""


class Bench:
    """A model, which is copied for each cell of the table, and the samples of both halves of the text."""

    figures = ("kept", "rank")

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        self.healing = Healing(self.model, tokenizer, arguments)
        self.spectra = Path(arguments.output) / "spectra"
        self.found: dict[tuple[str, float | None], LayerScores] = {}

    def tried(self, method: str, score: str, kept: float) -> list[Candidate]:
        """The candidates of a score; auto has the candidates of all others."""
        if score == "auto":
            return [c for other in SCORES for c in self.tried(method, other, kept)]
        if score == "fisher" and method == "plain":
            return []  # same as spectrum without a loss
        if score in WEIGHINGS and method == "oats":
            return []  # supports shares of parameters only, not ranks of matrices
        return candidates(score, kept)

    def plan(self, method: str, candidate: Candidate, kept: float) -> LayerAllocation | RankPlan:
        """The plan of ranks."""
        score, threshold, spread = candidate
        if score in WEIGHINGS:
            batches = self.calibration if method == "whitened" else None
            return plan_ranks(self.model, kept, score, batches=batches, journal=self.spectra)
        if (score, threshold) not in self.found:
            options = {} if threshold is None else {"threshold": threshold}
            self.found[score, threshold] = score_layers(self.model, method=score, batches=self.calibration, **options)
        return allocate(self.found[score, threshold], "parameter_share", kept, spread)

    def make(self, method: str, plan: LayerAllocation | RankPlan) -> tuple[Any, list[float]]:
        """The factorized model, and the shares of parameters and of rank that it keeps."""
        model: Any = copy.deepcopy(self.model)
        report = factorize(model, plan, method, batches=self.calibration)
        return model, [report.results["parameter_share"], report.results["full_rank_share"]]


def candidates(score: str, kept: float) -> list[Candidate]:
    """The candidates of a score, with lambda such that each share is in 0..1."""
    if score == "uniform" or score in WEIGHINGS:
        return [(score, None, None)]
    spreads = sorted({min(spread, kept, round(1 - kept, 9)) for spread in SPREADS})
    return [(score, *settings) for settings in product(THRESHOLDS if score == "owl" else (None,), spreads)]


def measured(bench: Any, journal: Journal, method: str, candidate: Candidate, removed: float) -> list[float]:
    """Perplexity of both texts with a candidate, and the shares that it keeps."""
    key = f"{method} {candidate} at {removed}"
    if key not in journal:
        model, kept = bench.make(method, bench.plan(method, candidate, 1 - removed))
        journal.add(key, [perplexity(model, bench.tuning), perplexity(model, bench.report), *kept])
    found: list[float] = journal[key]
    return found


def healed(bench: Any, journal: Journal, method: str, score: str, candidate: Candidate, removed: float) -> float | None:
    """Perplexity after healing; None if it is neither requested nor in the journal."""
    key = bench.healing.key(f"{method} {candidate} at {removed}")
    if key not in journal and bench.healing.asks(score):
        model, _ = bench.make(method, bench.plan(method, candidate, 1 - removed))
        journal.add(key, bench.healing.perplexity(model, bench.report))
    found: float | None = journal.get(key)
    return found


def fill_table(bench: Any, arguments: argparse.Namespace) -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    output = Path(arguments.output)
    chosen = ("output", "methods", "scores", "removed", *(name for name in vars(arguments) if name.startswith("heal")))
    settings = {k: v for k, v in vars(arguments).items() if k not in chosen}
    journal = Journal(output / "journal.jsonl", fingerprint(settings))
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    intact, rows = journal["intact"], []
    for removed, method, score in product(arguments.removed, arguments.methods, arguments.scores):
        found = {c: measured(bench, journal, method, c, removed) for c in bench.tried(method, score, 1 - removed)}
        if not found:
            continue
        best = min(found, key=lambda candidate: found[candidate][0])
        _, reported, *kept = found[best]
        by, threshold, spread = best
        named = {"method": method, "score": score, "removed": removed, "spread": spread}
        named["threshold"] = by if by != score else threshold
        row = {**named, "perplexity": reported, **dict(zip(bench.figures, kept, strict=True))}
        row["healed"] = healed(bench, journal, method, score, best, removed)
        rows.append(row)
        after = [] if row["healed"] is None else [f"healed {row['healed']:.1f}"]
        after += [f"{name} {row[name]:.3f}" for name in bench.figures]
        print(*named.values(), f"{reported:.1f}", *after, flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
        page = [markdown(rows, intact, "removed"), *describe_healing(rows, intact, bench.healing)]
        write_text(output / "table.md", "\n".join(page))


def main() -> None:
    """Parses the arguments, and computes the table."""
    parser = table_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["whitened", "plain"], choices=list(METHODS))
    parser.add_argument("--scores", nargs="+", default=[*SCORES, "auto"], choices=[*SCORES, "auto"])
    add_healing(parser)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--output", default="rank-table", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    fill_table(Bench(arguments), arguments)


if __name__ == "__main__":
    main()
