"""Perplexity of a factorized model: methods x scores x shares of parameters removed, with one calibration for all.

    python examples/rank_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

Everything that is chosen (OWL's threshold M, each score's lambda) is chosen on the first half of the text; all
perplexities that are reported are of the second half. Removed are parameters of the layers' matrices. An interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from owl_table import cut_samples, markdown, table_parser

from hf_cod import LayerAllocation, LayerScores, RankPlan, allocate, factorize, perplexity, plan_ranks, score_layers
from hf_cod.calibration import Batch
from hf_cod.files import Journal, fingerprint, write_json, write_text
from hf_cod.loading import ModelSettings, load_model
from hf_cod.low_rank import METHODS, WEIGHINGS

THRESHOLDS = (5.0, 10.0)
SPREADS = (0.08, 0.15)
SCORES = ("uniform", "owl", "angular", "spectrum", "fisher")
Candidate = tuple[float | None, float | None]
"""M and lambda."""


class Bench:
    """A model of which each cell of the table gets a copy, and the samples of both halves of the text."""

    figures = ("kept", "rank")

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        self.spectra = Path(arguments.output) / "spectra"
        self.found: dict[tuple[str, float | None], LayerScores] = {}

    def plan(self, method: str, score: str, candidate: Candidate, kept: float) -> LayerAllocation | RankPlan:
        """Which ranks the model gets."""
        threshold, spread = candidate
        if score in WEIGHINGS:
            batches = self.calibration if method == "whitened" else None
            by = score if batches else "spectrum"
            return plan_ranks(self.model, kept, by, batches=batches, journal=self.spectra)
        if (score, threshold) not in self.found:
            options = {} if threshold is None else {"threshold": threshold}
            self.found[score, threshold] = score_layers(self.model, method=score, batches=self.calibration, **options)
        return allocate(self.found[score, threshold], "parameters", kept, spread)

    def measure(self, method: str, plan: LayerAllocation | RankPlan, batches: Sequence[Batch]) -> list[float]:
        """Perplexity of the factorized model, and the shares of parameters and of rank that it keeps."""
        model: Any = copy.deepcopy(self.model)
        report = factorize(model, plan, method, batches=self.calibration)
        return [perplexity(model, batches), report.results["kept"], report.results["rank"]]


def candidates(score: str) -> list[Candidate]:
    """What a score is tried with."""
    if score in ("uniform", "auto") or score in WEIGHINGS:
        return [(None, None)]
    return list(product(THRESHOLDS if score == "owl" else (None,), SPREADS))


def chosen_settings(bench: Any, journal: Journal, method: str, score: str, removed: float) -> Candidate:
    """The candidate with the least perplexity on the first half."""
    tried = candidates(score)
    if len(tried) == 1:
        return tried[0]
    found = {}
    for candidate in tried:
        key = f"tune {method} {score} {candidate} at {removed}"
        if key not in journal:
            plan = bench.plan(method, score, candidate, 1 - removed)
            journal.add(key, bench.measure(method, plan, bench.tuning)[0])
        found[candidate] = journal[key]
    return min(found, key=lambda candidate: found[candidate])


def fill_table(bench: Any, arguments: argparse.Namespace) -> None:
    """Fills the table cell by cell, and writes it after each one."""
    output = Path(arguments.output)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "methods", "scores", "removed")}
    journal = Journal(output / "journal.jsonl", fingerprint(settings))
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    rows = []
    for removed, method, score in product(arguments.removed, arguments.methods, arguments.scores):
        candidate = chosen_settings(bench, journal, method, score, removed)
        key = f"{method} {score} {candidate} at {removed}"
        if key not in journal:
            plan = bench.plan(method, score, candidate, 1 - removed)
            journal.add(key, bench.measure(method, plan, bench.report))
        found, *kept = journal[key]
        named = {
            "method": method,
            "score": score,
            "removed": removed,
            "threshold": candidate[0],
            "spread": candidate[1],
        }
        row = {**named, "perplexity": found, **dict(zip(bench.figures, kept, strict=True))}
        rows.append(row)
        print(*named.values(), f"{found:.1f}", *(f"{name} {row[name]:.3f}" for name in bench.figures), flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": journal["intact"], "rows": rows})
        write_text(output / "table.md", markdown(rows, journal["intact"], "removed"))


def main() -> None:
    """Reads the arguments, and fills the table."""
    parser = table_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["whitened", "plain"], choices=list(METHODS))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--removed", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--output", default="rank-table", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    fill_table(Bench(arguments), arguments)


if __name__ == "__main__":
    main()
