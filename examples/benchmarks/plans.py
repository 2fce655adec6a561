"""Perplexity and KL divergence at equal budgets: plans by scores of layers and of matrices, at random, and by search.

    python examples/benchmarks/plans.py --model MODEL --text TEXT --output plans     # SmolLM2-135M: an hour on a core

Bits: stored bits per weight, matrices in 3 and 4 bits. Sparsity: share of zeros. Scores, statistics and the search see
the first half of the text, reported figures are of the second half. Divergences are from the intact model, in nats per
token. Each cell is one JSON file in the output directory, so that an interrupted run resumes; cells that do not fit
into --minutes are left out of the table. Random plans give a mean and a standard deviation over five seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_cod import (
    LayerAllocation,
    LayerScores,
    OwlBnbConfig,
    SampleSettings,
    TextSettings,
    allocate,
    collect_statistics,
    load_texts,
    prune,
    quantize,
    score_layers,
    search_plan,
    split_samples,
    token_batches,
)
from hf_cod.functional.distillation import logit_loss
from hf_cod.io.files import write_json, write_text
from hf_cod.io.models import ModelSettings, load_model

SEEDS = 5
SPREAD = 0.15  # lambda of the plans by scores; the search tries those of auto
BITS, SPARSITIES = (3.25, 3.5, 3.75), (0.5, 0.6, 0.7)
# Columns of the tables, in the order in which they are filled.
COLUMNS = (("bits", 3.5), ("sparsity", 0.7)), (("bits", 3.25), ("sparsity", 0.6)), (("bits", 3.75), ("sparsity", 0.5))
# Row -> (score, granularity).
SCORED = {
    "`uniform`": ("uniform", "layer"),
    "`owl` by layer": ("owl", "layer"),
    "`angular` by layer": ("angular", "layer"),
    "`fisher` by layer": ("fisher", "layer"),
    "`owl` by module": ("owl", "module"),
    "`fisher` by module": ("fisher", "module"),
    "`weight_norm` (L1) by layer": ("weight_norm", "layer"),
}
KEY = ("kind", "budget", "method", "row", "seed")
SEARCH, RANDOM = "search by module", "at random, by layer"
# Methods, the cheap one first: it fills all rows, the other one the search and these.
METHODS = {"sparsity": ("wanda", "sparsegpt"), "bits": ("weighted", "compensated")}
FEW = ("`uniform`", "`angular` by layer", "`fisher` by module")


class Bench:
    """The intact model, the samples of both halves of the text, and what the intact model says of the second one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.model.eval()
        text = "\n".join(load_texts(TextSettings(text=arguments.text)))
        cut = SampleSettings(sequence_length=arguments.sequence_length, batch_size=4)
        number = arguments.calibration_samples + arguments.search_samples
        first = token_batches(tokenizer, text[: len(text) // 2], replace(cut, max_samples=number))
        self.calibration, self.unseen = split_samples(first, arguments.calibration_samples)
        report = replace(cut, max_samples=arguments.report_samples)
        self.report = token_batches(tokenizer, text[len(text) // 2 :], report)
        self.statistics = collect_statistics(self.model, self.calibration)
        self.scores: dict[tuple, LayerScores] = {}
        with torch.no_grad():
            self.intact = [self.model(**batch, use_cache=False).logits for batch in self.report]

    def plan(self, kind: str, budget: float, row: str, seed: int) -> LayerAllocation | LayerScores | None:
        """A plan of sparsity; for bits the search's plan, else scores; None: the same for all."""
        if row == SEARCH:
            few, _ = split_samples(self.calibration, self.arguments.search_samples)
            tokens = self.arguments.search_tokens
            return search_plan(
                self.model,
                kind,
                budget,
                # Scores are of the first half, plans are measured on the second one.
                batches=[*few, *({name: rows[:, :tokens] for name, rows in one.items()} for one in self.unseen)],
                passes=self.arguments.passes,
                offspring=self.arguments.offspring,
                journal=Path(self.arguments.output) / "search",
            )
        method, granularity = SCORED.get(row, ("random", "layer"))
        if (method, granularity, seed) not in self.scores:
            options: dict[str, Any] = {"granularity": granularity} if granularity != "layer" else {}
            options |= {"seed": seed} if method == "random" else {}
            self.scores[method, granularity, seed] = score_layers(
                self.model, self.statistics, method, batches=self.calibration, **options
            )
        scores = self.scores[method, granularity, seed]
        return scores if kind == "bits" else allocate(scores, "sparsity", budget, min(SPREAD, budget, 1 - budget))

    def measure(self, kind: str, budget: float, method: str, row: str, seed: int) -> dict[str, Any]:
        """The cell of a plan."""
        start, plan = time.monotonic(), self.plan(kind, budget, row, seed)
        model = copy.deepcopy(self.model)
        if kind == "sparsity":
            results = prune(model, plan, method, batches=self.calibration).results
            told = {"sparsity": results["sparsity"]}
        else:
            config = OwlBnbConfig(allocation=plan) if row == SEARCH else OwlBnbConfig(bits=budget, scores=plan)
            config.statistics = self.statistics if method == "weighted" else None
            batches = self.calibration if method == "compensated" else None
            told = {"bits": quantize(model, config, batches=batches).results["bits"]}
            model.dequantize()  # the same weights, decoded once and not in each forward pass
        found = dict(zip(("perplexity", "divergence"), self.evaluate(model), strict=True))
        search = plan.search if isinstance(plan, LayerAllocation) else {}
        return {**found, **told, "search": search, "seconds": time.monotonic() - start}

    @torch.no_grad()
    def evaluate(self, model: Any) -> tuple[float, float]:
        """(perplexity, KL divergence from the intact model) on the second half."""
        loss = divergence = tokens = predicted = 0.0
        for batch, teacher in zip(self.report, self.intact, strict=True):
            logits = model(**batch, use_cache=False).logits
            targets = batch["input_ids"][:, 1:].flatten()
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"))
            divergence += float(logit_loss(logits, teacher)) * batch["input_ids"].numel()
            predicted += targets.numel()
            tokens += batch["input_ids"].numel()
        return math.exp(loss / predicted), divergence / tokens


def cells() -> Iterator[tuple[str, float, str, str, int]]:
    """(kind, budget, method, row, seed), in the order in which they are filled."""
    for budgets in COLUMNS:
        for row, (kind, budget) in product((*SCORED, SEARCH), budgets):
            yield kind, budget, METHODS[kind][0], row, 0
    for budgets in COLUMNS:
        for seed, (kind, budget) in product(range(SEEDS), budgets):
            yield kind, budget, METHODS[kind][0], RANDOM, seed
    for budgets in COLUMNS:
        for row, (kind, budget) in product((*FEW, SEARCH), budgets):
            yield kind, budget, METHODS[kind][1], row, 0


def markdown(found: dict[tuple, dict[str, Any]], intact: float) -> str:
    """Tables of both kinds of budget: perplexity and divergence; the lowest perplexity of each method in bold."""
    lines = [f"Perplexity (KL divergence) on the second half of the text; intact {intact:.1f}.", ""]
    for kind, budgets, form in (("bits", BITS, "g"), ("sparsity", SPARSITIES, ".0%")):
        lines.append("| method | plan | " + " | ".join(f"{budget:{form}}" for budget in budgets) + " |")
        lines.append("|---|---|" + "---:|" * len(budgets))
        for method in METHODS[kind]:
            rows = [row for row in (*SCORED, SEARCH, RANDOM) if any(key[2:4] == (method, row) for key in found)]
            for row in rows:
                figures = [figure(found, kind, budget, method, row) for budget in budgets]
                lines.append(f"| {method} | {row} | " + " | ".join(figures) + " |")
        lines.append("")
    return "\n".join(lines)


def figure(found: dict[tuple, dict[str, Any]], kind: str, budget: float, method: str, row: str) -> str:
    """One cell of the table."""
    here = {key: cell for key, cell in found.items() if key[:3] == (kind, budget, method)}
    cells = [cell for key, cell in here.items() if key[3] == row]
    if not cells:
        return "-"
    perplexities, divergences = ([cell[name] for cell in cells] for name in ("perplexity", "divergence"))
    text = f"{statistics.mean(perplexities):.1f}"
    if len(cells) > 1:
        text += f" ± {statistics.stdev(perplexities):.1f}"
    best = min(cell["perplexity"] for key, cell in here.items() if key[3] != RANDOM) if row != RANDOM else None
    return f"{f'**{text}**' if perplexities[0] == best else text} ({statistics.mean(divergences):.3f})"


def main() -> None:
    """Fills the table cell by cell, and writes it after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, directory or GGUF file")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--calibration-samples", type=int, default=16, help="to score, prune and round with")
    parser.add_argument("--search-samples", type=int, default=8, help="to measure plans on, in the search")
    parser.add_argument("--report-samples", type=int, default=16, help="for reported figures")
    parser.add_argument("--search-tokens", type=int, default=256, help="tokens in each of these samples, at most")
    parser.add_argument("--passes", type=int, default=1000, help="forward passes of each search")
    parser.add_argument("--offspring", type=int, default=8, help="changed plans of a generation")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no cell is begun after these; default: all")
    parser.add_argument("--output", default="plans", help="directory for table.md, table.json and the cells")
    arguments = parser.parse_args()
    output, start = Path(arguments.output), time.monotonic()
    todo = [*cells()]
    searches = len(BITS) + len(SPARSITIES)
    print(f"{len(todo)} cells; {searches} searches of {arguments.passes} forward passes of one sample", flush=True)
    bench = Bench(arguments)
    intact = bench.evaluate(bench.model)[0]
    found: dict[tuple, dict[str, Any]] = {}
    for key in todo:
        file = output / "cells" / ("-".join(map(str, key)).replace(" ", "_").replace("`", "") + ".json")
        if not file.exists():
            if time.monotonic() - start > 60 * arguments.minutes:
                continue
            write_json(file, bench.measure(*key))
        found[key] = json.loads(file.read_text(encoding="utf-8"))
        print(*key, f"{found[key]['perplexity']:.1f} {found[key]['divergence']:.3f}", flush=True)
        rows = [dict(zip(KEY, key, strict=True)) | cell for key, cell in found.items()]
        write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
        write_text(output / "table.md", markdown(found, intact))


if __name__ == "__main__":
    main()
