"""Perplexity of a mixture whose experts are smaller: of lower rank, with fewer channels, or fewer of them.

    python examples/expert_rank_table.py --model MIXTURE --text TEXT --report-text OTHER --output table

At each share of the experts' weights, four ways to keep it: `removed` removes whole experts, `narrowed` removes
channels of each expert, `own` factorizes the matrices of each expert on their own, `shared` with one factor for all
experts of a bank. Attention and routers are left as they are. The settings of each way, such as method and score, are
those with the lowest perplexity on the tuning samples; all reported perplexities are of the second half of the text, or
with --report-text of another text. Channels are rounded, so that `own` and `shared` get as many weights as the chosen
`narrowed` has kept. An interrupted run resumes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from owl_table import cut_samples, table_parser

from hf_cod import (
    allocate,
    drop_experts,
    factorize,
    find_decoder_layers,
    narrow,
    perplexity,
    plan_experts,
    plan_ranks,
    score_experts,
    score_layers,
)
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.scoring.methods import SPREADS
from hf_cod.scoring.settings import EXPERT_METHODS

REMOVED, NARROWED, FACTORIZED = "removed", "narrowed", ("own", "shared")
RANKS = [("fisher", "whitened"), ("spectrum", "whitened"), ("uniform", "whitened"), ("spectrum", "plain")]
METHODS = ("fluctuation", "taylor", "magnitude")
SCORES = ("owl", "angular")


class Bench:
    """A mixture, which is copied for each cell of the table, and the samples."""

    def __init__(self, arguments: Any) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        stack = find_decoder_layers(self.model)
        self.matrices = [matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)]
        self.include = [matrix.name for matrix in self.matrices]
        self.all = sum(stack.count_weights(index) for index in range(len(stack)))
        self.experts = sum(matrix.parameter.numel() for matrix in self.matrices)

    def settings(self, way: str, share: float) -> list[tuple[Any, ...]]:
        """What is tried; the choice is by the tuning samples."""
        if way == REMOVED:
            return [(score,) for score in EXPERT_METHODS]
        if way == NARROWED:
            spreads = sorted({min(lam, share, 1 - share) for lam in SPREADS})
            scores = [("uniform", None), *product(SCORES, spreads)]
            return [(method, *score) for method, score in product(METHODS, scores)]
        return [*RANKS]

    def make(self, way: str, share: float, setting: Sequence[Any]) -> tuple[Any, float]:
        """The smaller mixture, and the share of the experts' weights that it keeps.

        Args:
            way: a row of the table.
            share: the share to keep.
            setting: one of `settings`.
        """
        model: Any = copy.deepcopy(self.model)
        chosen = {"batches": self.calibration, "include": self.include}
        of_layers = 1 - (1 - share) * self.experts / self.all
        if way == REMOVED:
            scores = score_experts(model, method=setting[0], batches=self.calibration)
            drop_experts(model, plan_experts(model, 1 - share, scores))
        elif way == NARROWED:
            method, score, spread = setting
            scores = score_layers(model, method=score, batches=self.calibration)
            plan = allocate(scores, "parameter_share", of_layers, spread)
            narrow(model, plan, method, channel_multiple=8, **chosen)
        else:
            score, method = setting
            plan = of_layers
            if score != "uniform":
                batches = self.calibration if method == "whitened" else None
                options = {"include": self.include, "expert_basis": way, "batches": batches}
                plan = plan_ranks(model, of_layers, score, **options)
            factorize(model, plan, method, expert_basis=way, **chosen)
        lost = sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in model.parameters())
        return model, 1 - lost / self.experts

    def choose(self, way: str, share: float, journal: Journal) -> list[Any]:
        """The setting with the lowest perplexity on the tuning samples, and the share that it keeps."""
        found = []
        for setting in self.settings(way, share):
            key = f"tune {way} {setting} at {share:.6f}"
            if key not in journal:
                try:
                    model, kept = self.make(way, share, setting)
                except ValueError as error:  # a spread that no layer can have
                    journal.add(key, [str(error), None])
                else:
                    journal.add(key, [perplexity(model, self.tuning), kept])
            tuned, kept = journal[key]
            if kept is not None:
                found.append((tuned, list(setting), kept))
        if not found:
            raise ValueError(f"shares: expected shares that {way} can keep, got {share}; {tuned}")
        return list(min(found, key=lambda one: one[0])[1:])


def markdown(rows: list[dict[str, Any]], intact: float) -> str:
    """The table as a page: a row for each way, a column for each share; then the chosen settings."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = [
        f"Perplexity of the reported text, by share of the experts' weights that is kept; intact {intact:.2f}.",
        "",
    ]
    lines += ["| experts | " + " | ".join(f"{share:.1%}" for share in shares) + " |", "|---|" + "---:|" * len(shares)]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = {row["share"]: row["perplexity"] for row in rows if row["way"] == way}
        lines.append(f"| {way} | " + " | ".join(f"{mine[s]:.2f}" if s in mine else "-" for s in shares) + " |")
    told = [
        f"- {row['way']} at {row['share']:.1%}: {', '.join(str(part) for part in row['setting'] if part is not None)}; "
        f"{row['kept']:.2%} kept"
        for row in rows
    ]
    return "\n".join([*lines, "", *told, ""])


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    parser = table_parser(__doc__)
    parser.set_defaults(model="allenai/OLMoE-1B-7B-0924")
    ways = [REMOVED, NARROWED, *FACTORIZED]
    parser.add_argument("--shares", nargs="+", type=float, default=[0.875, 0.75, 0.625, 0.5], help="shares to keep")
    parser.add_argument("--output", default="expert-rank-table", help="directory for table.md, table.json, the journal")
    arguments = parser.parse_args()
    output, bench = Path(arguments.output), Bench(arguments)
    known = {k: v for k, v in vars(arguments).items() if k not in ("output", "shares")}
    journal = Journal(output / "journal.jsonl", fingerprint(known))
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    rows: list[dict[str, Any]] = []
    for share in arguments.shares:
        least = share
        for way in ways:
            setting, kept = bench.choose(way, least if way in FACTORIZED else share, journal)
            least = kept if way == NARROWED else least
            key = f"{way} {setting} at {least if way in FACTORIZED else share:.6f}"
            if key not in journal:
                model, _ = bench.make(way, least if way in FACTORIZED else share, setting)
                journal.add(key, perplexity(model, bench.report))
            row = {"way": way, "share": share, "setting": setting, "kept": kept, "perplexity": journal[key]}
            rows.append(row)
            print(f"{share:.1%} {way}: {journal[key]:.2f} ({setting}, {kept:.2%} kept)", flush=True)
            write_json(output / "table.json", {"settings": vars(arguments), "intact": journal["intact"], "rows": rows})
            write_text(output / "table.md", markdown(rows, journal["intact"]))


if __name__ == "__main__":
    main()
