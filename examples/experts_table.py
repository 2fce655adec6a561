"""Perplexity of a mixture without some of its experts: shares x scores, before and after healing.

    python examples/experts_table.py --model MIXTURE --text TEXT --report-text OTHER --heal 1M --output table

Experts are scored on samples of the first half of the text; all reported perplexities are of the second half, or with
--report-text of another text. `random` removes experts at random, with several seeds. With `merged`, removed experts
are merged into the most similar kept ones. With --heal each model is then trained on the first text to match the intact
model, and measured again. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from owl_table import cut_samples, markdown, table_parser
from table_healing import Healing, add_healing, describe_healing

from hf_cod import ExpertScores, drop_experts, perplexity, plan_experts, score_experts
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.scoring.settings import EXPERT_METHODS

RANDOM = "random"
METHODS = ("removed", "merged")


class Bench:
    """A mixture, which is copied for each cell of the table, the scores of its experts, and the samples."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        calibration, tuning, self.report = cut_samples(tokenizer, arguments)
        self.deciding = [*calibration, *tuning]
        self.healing = Healing(self.model, tokenizer, arguments)
        self.found: dict[str, ExpertScores] = {}

    def scores(self, name: str) -> ExpertScores:
        """The scores of the intact model, computed once; of "random 3", those of seed 3."""
        if name not in self.found:
            if name.startswith(RANDOM):
                self.found[name] = random_scores(self.scores("frequency"), int(name.split()[1]))
            else:
                self.found[name] = score_experts(self.model, method=name, batches=self.deciding)
        return self.found[name]

    def make(self, method: str, score: str, share: float) -> tuple[Any, float]:
        """The smaller mixture, and the share of the tokens' routes that led to removed experts, mean over layers."""
        model: Any = copy.deepcopy(self.model)
        plan = plan_experts(model, share, self.scores(score))
        drop_experts(model, plan, merge=method == "merged")
        return model, statistics.fmean(plan.removed_token_shares().values())


def random_scores(known: ExpertScores, seed: int) -> ExpertScores:
    """Scores by which experts are removed at random."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(len(each), generator=generator).tolist() for name, each in known.values.items()}
    return replace(known, method=RANDOM, values=values, settings={"seed": seed})


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    parser = table_parser(__doc__)
    parser.set_defaults(model="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--methods", nargs="+", default=["removed"], choices=list(METHODS))
    parser.add_argument("--scores", nargs="+", default=[*EXPERT_METHODS, RANDOM], choices=[*EXPERT_METHODS, RANDOM])
    parser.add_argument("--seeds", type=int, default=3, help="number of random choices of experts")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5], help="shares of experts to remove")
    add_healing(parser)
    parser.add_argument("--output", default="experts-table", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    output, bench = Path(arguments.output), Bench(arguments)
    cells = ("output", "methods", "scores", "seeds", "shares", *(k for k in vars(arguments) if k.startswith("heal")))
    journal = Journal(
        output / "journal.jsonl", fingerprint({k: v for k, v in vars(arguments).items() if k not in cells})
    )
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    intact, rows = journal["intact"], []
    fixed = [score for score in arguments.scores if score != RANDOM]
    drawn = [f"{RANDOM} {seed}" for seed in range(arguments.seeds)] if RANDOM in arguments.scores else []
    for share, method, score in product(arguments.shares, arguments.methods, [*fixed, *drawn]):
        key = f"{method} {score} at {share}"
        healed = bench.healing.key(key)
        to_heal = bench.healing.asks(score) and healed not in journal
        if key not in journal or to_heal:
            model, routes = bench.make(method, score, share)
            journal.add(key, [perplexity(model, bench.report), routes])
            if to_heal:
                journal.add(healed, bench.healing.perplexity(model, bench.report))
        found, routes = journal[key]
        after = journal.get(healed)
        named = {"method": method, "score": score, "share": share, "threshold": None, "spread": None}
        rows.append({**named, "perplexity": found, "healed": after, "removed_token_share": routes})
        told = "" if after is None else f", healed {after:.1f}"
        print(f"{share:.0%} {method} by {score}: {found:.1f}{told}; {routes:.0%} of the routes", flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
        page = [markdown(rows, intact, "share"), *describe_healing(rows, intact, bench.healing)]
        write_text(output / "table.md", "\n".join(page))


if __name__ == "__main__":
    main()
