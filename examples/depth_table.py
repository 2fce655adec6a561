"""Perplexity of a model with fewer layers: criteria x numbers of layers, with and without replacing linear maps.

    python examples/depth_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

Removed layers and linear maps are chosen on the first half of the text; all reported perplexities are of the second
half, or with --report-text of another text. With --heal each model is then trained on the first text to match the
intact model, and measured again. An interrupted run resumes, also within a search.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from owl_table import cut_samples, markdown, table_parser
from table_healing import Healing, add_healing, describe_healing

from hf_cod import drop_layers, perplexity, plan_depth
from hf_cod.compression.depth.criteria import CRITERIA
from hf_cod.compression.depth.settings import REPLACEMENTS
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import Batch


class Bench:
    """A model, which is copied for each cell of the table, and the samples of both halves of the text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        calibration, tuning, self.report = cut_samples(tokenizer, arguments)
        self.deciding: Sequence[Batch] = [*calibration, *tuning]
        self.healing = Healing(self.model, tokenizer, arguments)
        self.width, self.search = arguments.width, Path(arguments.output) / "search"

    def plan(self, criterion: str, count: int, replacement: str) -> list[int]:
        """The layers to remove; for search, the candidate that is best with its replacement."""
        options: dict[str, Any] = {"search_width": self.width, "journal": self.search, "show_progress": True}
        options["replacement"] = replacement
        return plan_depth(self.model, count, criterion, batches=self.deciding, **options).layers

    def make(self, layers: list[int], replacement: str) -> tuple[Any, int]:
        """The shorter model, and the number of maps in it."""
        model: Any = copy.deepcopy(self.model)
        report = drop_layers(model, layers, replacement, batches=self.deciding)
        return model, sum(entry["used"] for entry in report.results["replacements"])


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    parser = table_parser(__doc__)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    add_healing(parser)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3, 5, 7, 10], help="numbers of layers to remove")
    parser.add_argument("--replacements", nargs="+", default=["none", "measured"], choices=list(REPLACEMENTS))
    parser.add_argument("--width", type=int, default=8, help="number of layers that each step of the search tries")
    parser.add_argument("--output", default="depth-table", help="directory for the table, plans and journals")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    chosen = ("output", "criteria", "layers", "replacements", *(k for k in vars(arguments) if k.startswith("heal")))
    settings = {k: v for k, v in vars(arguments).items() if k not in chosen}
    bench = Bench(arguments)
    journal = Journal(output / "journal.jsonl", fingerprint(settings))
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    intact, rows = journal["intact"], []
    for count, criterion, replacement in product(arguments.layers, arguments.criteria, arguments.replacements):
        chosen_by = f"{count} by {criterion}"
        if criterion == "search" and replacement != "none":
            chosen_by += f", compared with {replacement}"
        key = f"{chosen_by} with {replacement}"
        if chosen_by not in journal:
            journal.add(chosen_by, bench.plan(criterion, count, replacement))
        layers = journal[chosen_by]
        healed = bench.healing.key(key)
        to_heal = bench.healing.asks(criterion) and healed not in journal
        if key not in journal or to_heal:
            model, maps = bench.make(layers, replacement)
            journal.add(key, [perplexity(model, bench.report), maps])
            if to_heal:
                journal.add(healed, bench.healing.perplexity(model, bench.report))
        found, maps = journal[key]
        after = journal.get(healed)
        named = {"method": replacement, "score": criterion, "layers": count, "threshold": None, "spread": None}
        rows.append({**named, "perplexity": found, "healed": after, "maps": maps, "removed": layers})
        told = "" if after is None else f"healed {after:.1f}"
        print(count, criterion, replacement, layers, f"{found:.1f}", told, f"{maps} maps", flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
        page = [markdown(rows, intact, "layers", "d"), *describe_healing(rows, intact, bench.healing)]
        write_text(output / "table.md", "\n".join(page))


if __name__ == "__main__":
    main()
