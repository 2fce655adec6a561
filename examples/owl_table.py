"""Perplexity of a pruned model: methods x scores x sparsities, with one calibration for all.

    python examples/owl_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table      # SmolLM2-135M in an hour

All settings (OWL's threshold M, lambda of each score) are chosen on the first half of the text: by Wanda with the
statistics of the intact model or, for magnitude pruning, by magnitude. All reported perplexities are of the second
half, or with --report-text of another text. An interrupted run resumes. The table ends with a comparison of auto with
each other score: the number of cells with lower perplexity, and the mean ratio of perplexities.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hf_cod import LayerScores, allocate, collect_statistics, find_decoder_layers, perplexity, prune, score_layers
from hf_cod.compression.pruning.methods import METHODS
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import Batch, SampleSettings, TextSettings, load_texts, split_samples, token_batches
from hf_cod.scoring.methods import SPREADS  # those of auto: each score is tried with the same ones
from hf_cod.scoring.settings import PRUNERS

THRESHOLDS = (3.0, 5.0, 7.0, 10.0)
SCORES = ("uniform", "owl", "angular", "block_influence", "sensitivity", "auto")


class Bench:
    """A model, which is restored for each cell of the table, and the samples of both halves of the text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.stack = find_decoder_layers(self.model)
        self.intact = [{name: W.clone() for name, W in self.stack.matrices(i)} for i in range(len(self.stack))]
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        self.statistics = collect_statistics(self.model, self.calibration)
        self.found: dict[tuple, LayerScores] = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the intact weights."""
        for index, matrices in enumerate(self.intact):
            for name, W in self.stack.matrices(index):
                W.copy_(matrices[name])

    def scores(self, method: str, threshold: float | None, S: float, pruner: str) -> LayerScores:
        """The scores of the intact model, computed once."""
        key = method, threshold, (S, pruner) if method in ("auto", "sensitivity") else None
        if key not in self.found:
            self.restore()
            options: dict = {"target": S, "pruner": pruner} if method in ("auto", "sensitivity") else {}
            options |= {} if threshold is None else {"threshold": threshold}
            self.found[key] = score_layers(self.model, self.statistics, method, batches=self.calibration, **options)
        return self.found[key]

    def tune(self, scores: LayerScores, S: float, spread: float | None, pruner: str) -> float:
        """Perplexity on the tuning text, after pruning with the statistics of the intact model."""
        self.restore()
        statistics = self.statistics if pruner == "wanda" else None
        prune(self.model, allocate(scores, budget=S, spread=spread), pruner, statistics=statistics)
        return perplexity(self.model, self.tuning)

    def measure(self, method: str, scores: LayerScores, S: float, spread: float | None) -> float:
        """Perplexity on the reported text, after pruning layer by layer."""
        self.restore()
        prune(self.model, allocate(scores, budget=S, spread=spread), method, batches=self.calibration)
        return perplexity(self.model, self.report)


def two_texts(arguments: argparse.Namespace) -> tuple[str, str]:
    """The tuning text and the reported text: two texts, or the halves of one."""
    text = "\n".join(load_texts(TextSettings(text=arguments.text)))
    if arguments.report_text is None:
        return text[: len(text) // 2], text[len(text) // 2 :]
    return text, "\n".join(load_texts(TextSettings(text=arguments.report_text)))


def cut_samples(tokenizer: Any, arguments: argparse.Namespace) -> tuple[list[Batch], list[Batch], Sequence[Batch]]:
    """Calibration and tuning samples of one text, and samples of the reported text."""
    halves = two_texts(arguments)
    cut = SampleSettings(sequence_length=arguments.sequence_length, batch_size=4, seed=arguments.seed)
    first = replace(cut, max_samples=arguments.calibration_samples + arguments.tuning_samples)
    calibration, tuning = split_samples(token_batches(tokenizer, halves[0], first), arguments.calibration_samples)
    return calibration, tuning, token_batches(tokenizer, halves[1], replace(cut, max_samples=arguments.report_samples))


def candidates(score: str, S: float) -> Iterator[tuple[float | None, float | None]]:
    """The candidates (M, lambda) of a score; auto has its own search."""
    if score in ("uniform", "auto"):
        yield None, None
    else:
        yield from product(THRESHOLDS if score == "owl" else (None,), sorted({min(lam, S, 1 - S) for lam in SPREADS}))


def chosen_settings(
    bench: Bench, journal: Journal, score: str, S: float, pruner: str
) -> tuple[float | None, float | None]:
    """The candidate with the lowest perplexity on the tuning text."""
    tried = list(candidates(score, S))
    if len(tried) == 1:
        return tried[0]
    found = {}
    for threshold, spread in tried:
        key = f"tune {pruner} {score} {threshold} {spread} at {S}"
        if key not in journal:
            journal.add(key, bench.tune(bench.scores(score, threshold, S, pruner), S, spread, pruner))
        found[threshold, spread] = journal[key]
    return min(found, key=lambda candidate: found[candidate])


def cell(row: dict, best: bool) -> str:
    """A perplexity with its settings."""
    figure = f"**{row['perplexity']:.1f}**" if best else f"{row['perplexity']:.1f}"
    figure += f" → {row['healed']:.1f}" if row.get("healed") is not None else ""
    named = [f"λ {row['spread']:g}"] if row["spread"] else []
    if row["threshold"] is not None:
        named.append(row["threshold"] if row["score"] == "auto" else f"M {row['threshold']:g}")
    return f"{figure} ({', '.join(named)})" if named else figure


def markdown(rows: list[dict], intact: float, budget: str = "sparsity", form: str = ".0%") -> str:
    """The table as a page with one column per budget, formatted by `form`; the best score of each method in bold."""
    budgets = sorted({row[budget] for row in rows})
    lines = [f"Perplexity of the reported text; intact {intact:.1f}.", ""]
    lines.append("| method | score | " + " | ".join(f"{S:{form}}" for S in budgets) + " |")
    lines.append("|---|---|" + "---:|" * len(budgets))
    for method, score in dict.fromkeys((row["method"], row["score"]) for row in rows):
        cells = []
        for S in budgets:
            column = {r["score"]: r for r in rows if r["method"] == method and r[budget] == S}
            best = min(column, key=lambda name: column[name]["perplexity"], default=None)
            cells.append(cell(column[score], score == best) if score in column else "-")
        lines.append(f"| {method} | {score} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *against_auto(rows, budget), ""])


def against_auto(rows: list[dict], budget: str) -> list[str]:
    """Comparison of auto with each other score over common cells: wins, and geometric mean of the ratios."""
    figures = {(row["score"], row["method"], row[budget]): row["perplexity"] for row in rows}
    cells = [key[1:] for key in figures if key[0] == "auto"]
    lines = []
    for score in dict.fromkeys(row["score"] for row in rows if row["score"] != "auto"):
        ratios = [figures[(score, *at)] / figures[("auto", *at)] for at in cells if (score, *at) in figures]
        if ratios:
            wins, mean = sum(ratio > 1 for ratio in ratios), statistics.geometric_mean(ratios)
            lines.append(
                f"- {score}: auto is lower in {wins} of {len(ratios)} cells; perplexity {score} / auto {mean:.3f}"
            )
    return lines


def table_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a table's model, text and samples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, directory or GGUF file")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--report-text", help="another text to report on; default: the second half of --text")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--calibration-samples", type=int, default=16, help="number of calibration samples")
    parser.add_argument("--tuning-samples", type=int, default=8, help="number of samples for the choice of settings")
    parser.add_argument("--report-samples", type=int, default=16, help="number of samples for reported perplexities")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Fills the table cell by cell, and writes it after each one."""
    parser = table_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), help="any scores of hf-cod score")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--output", default="owl-table", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    bench = Bench(arguments)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "methods", "scores", "sparsities")}
    journal = Journal(output / "journal.jsonl", fingerprint(settings))
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    rows = []
    for S, method, score in product(arguments.sparsities, arguments.methods, arguments.scores):
        pruner = method if method in PRUNERS else "wanda"
        threshold, spread = chosen_settings(bench, journal, score, S, pruner)
        key = f"{method} {score} {threshold} {spread} at {S}"
        if key not in journal:
            scores = bench.scores(score, threshold, S, pruner)
            figure = bench.measure(method, scores, S, spread)
            journal.add(key, [figure, scores.settings.get("spread", spread), scores.settings.get("chosen", threshold)])
        found, spread, threshold = journal[key]  # for auto, its choice is stored as the threshold
        named = {"method": method, "score": score, "sparsity": S, "threshold": threshold, "spread": spread}
        rows.append({**named, "perplexity": found})
        print(*named.values(), f"{found:.1f}", flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": journal["intact"], "rows": rows})
        write_text(output / "table.md", markdown(rows, journal["intact"]))


if __name__ == "__main__":
    main()
