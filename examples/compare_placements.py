"""Trains the same small model with every norm placement and several seeds, each at its own best learning rate.

    python examples/compare_placements.py --text corpus/train.jsonl --validation-text corpus/validation.jsonl

First one short run for every placement and learning rate of the grid (the same for all, seed 0), then `seeds` runs of
each placement at the rate with the lowest validation perplexity. Writes one directory with a report.json per run, and
comparison.json and comparison.md. The same command skips finished runs and resumes interrupted ones.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pretrain import pretrain

from hf_cod.cli.parser import SettingsParser
from hf_cod.io.files import write_json, write_text
from hf_cod.io.report import RunReport, format_number
from hf_cod.training.pretraining.preparation import claim, prepare
from hf_cod.training.pretraining.recipes import PretrainSettings
from hf_cod.training.pretraining.results import unigram_perplexity

# Column of the table -> function that reads it from the report of a run.
FIGURES = {
    "validation perplexity": lambda report: report.results["validation_perplexity"],
    "last layer's variance": lambda report: report.layers["variance"][-1],
    "effective depth": lambda report: report.results.get("effective_depth", {}).get("value", float("nan")),
    "late half's share of angles": lambda report: report.results.get("late_share", float("nan")),
}


# A run counts as learnt if its perplexity is below this share of that of a unigram model.
LEARNT = 0.9


@dataclass
class ComparisonSettings:
    """Settings of the runs."""

    placements: list[str] = field(
        default_factory=lambda: ["pre", "post", "deepnorm", "scaled_init", "mix", "lns", "sandwich"],
        metadata={"help": "placements to compare"},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 4e-3], metadata={"help": "the grid, the same for each placement"}
    )
    grid_steps: int = field(default=150, metadata={"help": "steps of each run of the grid"})
    seeds: int = field(default=3, metadata={"help": "runs of each placement at its best learning rate"})
    jobs: int = field(default=2, metadata={"help": "runs at a time; they share the cores"})
    directory: str = field(default="hf-cod-placements", metadata={"help": "directory of all runs"})


def directory(chosen: ComparisonSettings, placement: str, rate: float, seed: int, steps: int) -> Path:
    """Directory of a run; its name has all settings in which runs differ."""
    return Path(chosen.directory) / f"{placement}-lr{rate:g}-seed{seed}-steps{steps}"


def report_of(folder: Path) -> RunReport | None:
    """The report of a finished run."""
    return RunReport.load(folder) if (folder / "report.json").is_file() else None


def perplexity_of(folder: Path) -> float:
    """Validation perplexity of a finished run; infinite for one that diverged."""
    report = report_of(folder)
    value = report.results["validation_perplexity"] if report else None
    return math.inf if value is None or math.isnan(value) else value


def train(settings: PretrainSettings) -> str:
    """One run, in a worker process that may execute several runs."""
    pretrain(settings)
    return str(settings.output)


def train_all(wanted: list[PretrainSettings], jobs: int) -> None:
    """Trains the runs that are not finished, `jobs` at a time.

    Raises:
        ValueError: the directory of a run holds one with other settings or another text.
    """
    for settings in wanted:
        claim(settings)
    missing = [settings for settings in wanted if report_of(Path(str(settings.output))) is None]
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for number, name in enumerate(pool.map(train, missing), 1):
            print(f"{number} of {len(missing)}: {name} {format_number(perplexity_of(Path(name)))}", flush=True)


def grid(chosen: ComparisonSettings, base: PretrainSettings) -> dict[str, float]:
    """Placement -> the learning rate of the grid with the lowest validation perplexity."""
    cells = [(placement, rate) for rate in chosen.learning_rates for placement in chosen.placements]
    folders = {cell: directory(chosen, *cell, 0, chosen.grid_steps) for cell in cells}
    train_all([run(base, folders[cell], *cell, 0, chosen.grid_steps) for cell in cells], chosen.jobs)
    return {
        placement: min(chosen.learning_rates, key=lambda rate: perplexity_of(folders[placement, rate]))
        for placement in chosen.placements
    }


def run(base: PretrainSettings, folder: Path, placement: str, rate: float, seed: int, steps: int) -> PretrainSettings:
    """One run's settings."""
    changes = {"output": str(folder), "norm_placement": placement, "learning_rate": rate, "seed": seed, "steps": steps}
    return replace(base, **changes, evaluate_every=steps)


def baseline(base: PretrainSettings, folder: str) -> float:
    """Perplexity of a unigram model (frequencies of tokens)."""
    prepared = prepare(replace(base, output=str(Path(folder) / "text")))
    train, validation = prepared.train, prepared.validation
    return unigram_perplexity(train.windows, validation.windows, prepared.model.config.vocab_size)


def table(chosen: ComparisonSettings, best: dict[str, float], steps: int, bound: float) -> dict[str, dict[str, Any]]:
    """Placement -> best learning rate, seeds that learnt (perplexity below `bound`) and, for each figure, mean,
    standard deviation and the values of all seeds."""
    rows = {}
    for placement, rate in best.items():
        folders = [directory(chosen, placement, rate, seed, steps) for seed in range(chosen.seeds)]
        reports = [report for report in map(report_of, folders) if report is not None]
        row: dict[str, Any] = {"learning_rate": rate}
        for name, read in FIGURES.items():
            values = [read(report) for report in reports if report.layers]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[name] = {"mean": statistics.fmean(values) if values else None, "spread": spread, "values": values}
        row["diverged"] = sum(not report.layers for report in reports)
        row["learnt"] = sum(value < bound for value in row["validation perplexity"]["values"])
        rows[placement] = row
    return rows


def markdown(rows: dict[str, dict[str, Any]], unigram: float) -> str:
    """The table as Markdown: mean ± standard deviation over seeds."""
    header = ["placement", "best learning rate", "seeds that learnt", *FIGURES]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for placement, row in rows.items():
        seeds = len(row["validation perplexity"]["values"]) + row["diverged"]
        cells = [placement, f"{row['learning_rate']:g}", f"{row['learnt']} of {seeds}"]
        for name in FIGURES:
            spread = f" ± {format_number(row[name]['spread'])}" if row[name]["spread"] is not None else ""
            cells.append(format_number(row[name]["mean"]) + spread)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"A unigram model (frequencies of tokens) has perplexity {format_number(unigram)}; a run counts as learnt",
    ]
    lines += [f"below {LEARNT:.0%} of it. Learning rates are chosen on the same validation text, by short runs."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the grid and the seeds, and writes the table."""
    parser = SettingsParser([ComparisonSettings, PretrainSettings], description=__doc__.split("\n\n")[0])
    chosen, base = parser.parse(sys.argv[1:] if arguments is None else arguments)[:2]
    steps = base.recipe.steps
    best = grid(chosen, base)
    print("best learning rates:", best, flush=True)
    cells = [(placement, rate, seed, steps) for seed in range(chosen.seeds) for placement, rate in best.items()]
    train_all([run(base, directory(chosen, *cell), *cell) for cell in cells], chosen.jobs)
    unigram = baseline(base, chosen.directory)
    rows = table(chosen, best, steps, LEARNT * unigram)
    settings = {"grid_steps": chosen.grid_steps, "learning_rates": chosen.learning_rates, **base.describe()}
    found = {"settings": settings, "unigram": unigram, "placements": rows}
    write_json(Path(chosen.directory) / "comparison.json", found)
    write_text(Path(chosen.directory) / "comparison.md", markdown(rows, unigram))
    print(markdown(rows, unigram))


if __name__ == "__main__":
    main()
