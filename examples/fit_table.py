"""Comparison of combinations of methods with each single method, at equal budgets.

    python examples/fit_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

`plan_fit` chooses on the first half of the text. The single methods and combinations that it measured completely are
then applied again and measured on the second half, or with --report-text on another text. Budgets share their
measurements. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from owl_table import cut_samples, table_parser

from hf_cod import FitPlan, apply_steps, perplexity, plan_fit
from hf_cod.compression.fit.knobs import Applying, describe_steps
from hf_cod.compression.fit.settings import KINDS
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.layers.size import size_of

BUDGETS = ("parameter_share=0.8", "bits=3.5", "bits=3.2")


class Bench:
    """Intact copies of a model, and the samples of both halves of the text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._name, self._loading = arguments.model, ModelSettings(dtype=arguments.dtype)
        self.trials = Path(arguments.output) / "trials"
        tokenizer = load_model(self._name, self._loading)[1]
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)

    def make(self) -> Any:
        """A copy of the intact model."""
        return load_model(self._name, self._loading)[0]

    def measure(self, steps: dict[str, float]) -> list[float]:
        """Perplexity of the second half with these steps, and the bytes of the layers."""
        model = self.make()
        apply_steps(model, steps, Applying(self.calibration, measured=self.trials))
        return [perplexity(model, self.report), size_of(model).layer_bytes]


def rows_of(plan: FitPlan, bench: Bench, journal: Journal) -> list[dict[str, Any]]:
    """The complete measurements of a plan, repeated on the other text."""
    rows = []
    for trial in plan.tried:
        key = describe_steps(trial["steps"])
        if key not in journal:
            journal.add(key, bench.measure(trial["steps"]))
        found, size = journal[key]
        row = {"budget": f"{plan.kind} {plan.budget:g}", "steps": trial["steps"], "expected": trial["expected"]}
        row |= {"tuning_loss": trial["loss"], "perplexity": found, "layer_bytes": size}
        rows.append(row | {"chosen": trial["steps"] == plan.steps})
    return rows


def markdown(rows: list[dict[str, Any]], intact: float) -> str:
    """The rows as a page; the chosen plan in bold."""
    lines = [f"Perplexity of the reported text; intact {intact:.1f}.", ""]
    lines += ["| budget | steps | MB of the layers | loss on the text to choose by | perplexity |"]
    lines += ["|---|---|---:|---:|---:|"]
    for row in rows:
        found = f"**{row['perplexity']:.1f}**" if row["chosen"] else f"{row['perplexity']:.1f}"
        told = f"{row['layer_bytes'] / 1e6:.1f} | {row['tuning_loss']:.3f} | {found}"
        lines.append(f"| {row['budget']} | {describe_steps(row['steps'])} | {told} |")
    return "\n".join([*lines, ""])


def budget(told: str) -> tuple[str, float]:
    """Kind and value of a budget such as "bits=3.5"."""
    kind, _, value = told.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"expected KIND=VALUE with one of {', '.join(KINDS)}, got {told!r}")
    return kind, float(value)


def main() -> None:
    """Plans and measures each budget, and writes the table after each one."""
    parser = table_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", type=budget, default=[budget(told) for told in BUDGETS])
    parser.add_argument("--knobs", nargs="+", help="methods to choose from; default: all that are applicable")
    parser.add_argument("--n-verified", type=int, default=3, help="number of combinations that are measured completely")
    parser.add_argument("--output", default="fit-table", help="directory for the table, plans and journals")
    arguments = parser.parse_args()
    output, bench = Path(arguments.output), Bench(arguments)
    chosen = ("output", "budgets", "knobs", "n_verified")
    journal = Journal(
        output / "journal.jsonl", fingerprint({k: v for k, v in vars(arguments).items() if k not in chosen})
    )
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.make(), bench.report))
    rows: list[dict[str, Any]] = []
    for kind, value in arguments.budgets:
        options = {"knobs": arguments.knobs, "n_verified": arguments.n_verified, "journal": bench.trials}
        plan = plan_fit(bench.make, kind, value, bench.calibration, bench.tuning, show_progress=True, **options)
        plan.save(output / f"plan-{kind}-{value:g}.json")
        rows += rows_of(plan, bench, journal)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": journal["intact"], "rows": rows})
        write_text(output / "table.md", markdown(rows, journal["intact"]))
        print(markdown(rows, journal["intact"]), flush=True)


if __name__ == "__main__":
    main()
