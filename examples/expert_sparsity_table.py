"""Perplexity of a pruned mixture of experts: sparsities of layers, or of single experts, at equal budgets.

    python examples/expert_sparsity_table.py --model MIXTURE --text TEXT --report-text OTHER --output table

Scores and inputs come from samples of the first half of the text; all reported perplexities are of the second half, or
with --report-text of another text. `uniform` prunes all matrices alike, `layer: SCORE` layers by their scores, `expert:
SCORE` each expert by its own score and attention by the layers' angular distances. The spread of each cell is the one
with the lowest perplexity on the tuning samples. An interrupted run resumes.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from experts_table import RANDOM, random_scores
from owl_table import cut_samples, table_parser

from hf_cod import LayerAllocation, LayerScores, allocate, perplexity, prune, score_experts, score_layers
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.scoring.methods import SPREADS
from hf_cod.scoring.settings import EXPERT_METHODS

METHODS = ("magnitude", "wanda", "sparsegpt")
LAYER_SCORES = ("owl", "angular")
UNIFORM, LAYER, EXPERT = "uniform", "layer: ", "expert: "


class Bench:
    """A mixture, which is copied for each cell of the table, its scores, and the samples."""

    def __init__(self, arguments: Any) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        self.known: dict[str, Any] = {}

    def layers(self, method: str) -> LayerScores:
        """The scores of the intact model's layers, computed once."""
        if method not in self.known:
            self.known[method] = score_layers(self.model, method=method, batches=self.calibration)
        return self.known[method]

    def plan(self, choice: str, budget: float, spread: float, seed: int) -> LayerAllocation:
        """The sparsities of a choice; `seed` is that of random scores."""
        method = choice.partition(": ")[2]
        if choice.startswith(EXPERT):
            of = "frequency" if method == RANDOM else method
            if choice not in self.known:
                self.known[choice] = score_experts(self.model, method=of, batches=self.calibration)
            scores = random_scores(self.known[choice], seed) if method == RANDOM else self.known[choice]
            return allocate(self.layers("angular"), "sparsity", budget, spread, expert_scores=scores)
        return allocate(self.layers(method or UNIFORM), "sparsity", budget, spread)

    def measure(self, plan: LayerAllocation, method: str, samples: Any) -> float:
        """The perplexity of the pruned mixture."""
        model: Any = copy.deepcopy(self.model)
        prune(model, plan, method, batches=None if method == "magnitude" else self.calibration)
        return perplexity(model, samples)


def choices() -> Iterator[str]:
    """All choices of what has a sparsity of its own."""
    yield UNIFORM
    yield from (LAYER + score for score in LAYER_SCORES)
    yield from (EXPERT + score for score in (*EXPERT_METHODS, RANDOM))


def cell(bench: Bench, journal: Journal, place: tuple[str, str, float, int]) -> tuple[float, float]:
    """(perplexity, chosen spread) of a choice, method, sparsity and seed."""
    choice, method, budget, seed = place
    found = {}
    for spread in (0.0,) if choice == UNIFORM else sorted({min(lam, budget, 1 - budget) for lam in SPREADS}):
        key = f"tune {choice} {method} {budget} {seed} {spread}"
        if key not in journal:
            journal.add(key, bench.measure(bench.plan(choice, budget, spread, seed), method, bench.tuning))
        found[spread] = journal[key]
    spread = min(found, key=lambda one: found[one])
    key = f"{choice} {method} {budget} {seed} {spread}"
    if key not in journal:
        journal.add(key, bench.measure(bench.plan(choice, budget, spread, seed), method, bench.report))
    return journal[key], spread


def markdown(rows: list[dict[str, Any]], intact: float) -> str:
    """The table as a page: a row for each choice, a column for each method and sparsity; of several seeds the mean."""
    columns = list(dict.fromkeys((row["method"], row["sparsity"]) for row in rows))
    heads = " | ".join(f"{method} {budget:.0%}" for method, budget in columns)
    lines = [f"Perplexity of the reported text; intact {intact:.2f}.", ""]
    lines += [f"| sparsities by | {heads} |", "|---|" + "---:|" * len(columns)]
    for choice in dict.fromkeys(row["choice"] for row in rows):
        cells = []
        for column in columns:
            mine = [row for row in rows if row["choice"] == choice and (row["method"], row["sparsity"]) == column]
            values = [row["perplexity"] for row in mine]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "-")
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    parser = table_parser(__doc__)
    parser.set_defaults(model="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7], help="shares of zeros")
    parser.add_argument("--choices", nargs="+", default=[*choices()], choices=[*choices()])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of random choices")
    parser.add_argument("--output", default="expert-sparsity", help="directory for table.md, table.json, the journal")
    arguments = parser.parse_args()
    output, bench = Path(arguments.output), Bench(arguments)
    cells = ("output", "choices", "methods", "sparsities", "seeds")
    journal = Journal(
        output / "journal.jsonl", fingerprint({k: v for k, v in vars(arguments).items() if k not in cells})
    )
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    intact, rows = journal["intact"], []
    for choice, method, budget in product(arguments.choices, arguments.methods, arguments.sparsities):
        for seed in range(arguments.seeds if choice.endswith(RANDOM) else 1):
            found, spread = cell(bench, journal, (choice, method, budget, seed))
            named = {"choice": choice, "method": method, "sparsity": budget, "seed": seed, "spread": spread}
            rows.append({**named, "perplexity": found})
            print(f"{choice}, {method}, {budget:.0%}: {found:.2f} with spread {spread:g}", flush=True)
            write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
            write_text(output / "table.md", markdown(rows, intact))


if __name__ == "__main__":
    main()
