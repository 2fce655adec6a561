"""Perplexity of a mixture of experts in few bits: which layers, or which experts, get four bits instead of three.

    python examples/expert_bits_table.py --model MIXTURE --text TEXT --report-text OTHER --bits 3.5 --output table

Scores and products for error compensation come from samples of the first half of the text; all reported perplexities
are of the second half, or with --report-text of another text. `uniform` divides the four bits equally among layers;
`layer: SCORE` gives them to the layers with the highest scores, `expert: SCORE` to attention and then to the experts
with the highest scores of all layers. Four bits for all, rounded to nearest, are NF4. An interrupted run resumes.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experts_table import RANDOM, random_scores
from owl_table import cut_samples, table_parser

from hf_cod import (
    ExpertScores,
    LayerAllocation,
    OwlBnbConfig,
    allocate,
    find_decoder_layers,
    perplexity,
    plan_bits,
    quantize,
    score_experts,
    score_layers,
)
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.scoring.settings import EXPERT_METHODS

ROUNDINGS = ("nearest", "compensated")
LAYER_SCORES = ("depth", "weight_norm", "owl", "angular")
NF4, UNIFORM, LAYER, EXPERT = "all in 4 bits", "uniform", "layer: ", "expert: "


class Bench:
    """A mixture, which is copied for each cell of the table, its scores, and the samples."""

    def __init__(self, arguments: Any) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        calibration, tuning, self.report = cut_samples(tokenizer, arguments)
        self.deciding = [*calibration, *tuning]
        self.bits: float = arguments.bits

    def config(self, choice: str, seed: int) -> OwlBnbConfig:
        """How a choice stores the model; `seed` is that of random scores."""
        if choice == NF4:
            return OwlBnbConfig(bits=4)
        if choice == UNIFORM:
            return OwlBnbConfig(allocation=self.alike())
        method = choice.partition(": ")[2]
        if choice.startswith(LAYER):
            options: dict[str, Any] = {"seed": seed} if method == RANDOM else {}
            return OwlBnbConfig(
                bits=self.bits, scores=score_layers(self.model, method=method, batches=self.deciding, **options)
            )
        return OwlBnbConfig(bits=self.bits, expert_scores=self.experts(method, seed))

    def alike(self) -> LayerAllocation:
        """The same mean of three and four bits in all layers."""
        stack = find_decoder_layers(self.model)
        few, many = (plan_bits(stack, bits).stored for bits in (3, 4))
        return allocate(score_layers(self.model, method="uniform"), "bits", 3 + (self.bits - few) / (many - few))

    def experts(self, method: str, seed: int) -> ExpertScores:
        """The scores of the intact model's experts."""
        found = score_experts(self.model, method="frequency" if method == RANDOM else method, batches=self.deciding)
        return random_scores(found, seed) if method == RANDOM else found

    def measure(self, choice: str, rounding: str, seed: int) -> list[float]:
        """[perplexity, stored bits per weight]."""
        model: Any = copy.deepcopy(self.model)
        batches = self.deciding if rounding == "compensated" else None
        report = quantize(model, self.config(choice, seed), batches=batches)
        model.dequantize()  # the same weights, decoded once and not in each forward pass
        return [perplexity(model, self.report), report.results["bits"]]


def choices() -> Iterator[str]:
    """All choices of what gets four bits."""
    yield from (NF4, UNIFORM)
    yield from (LAYER + score for score in (*LAYER_SCORES, RANDOM))
    yield from (EXPERT + score for score in (*EXPERT_METHODS, RANDOM))


def markdown(rows: list[dict[str, Any]], intact: float) -> str:
    """The table as a page: a row for each choice, a column for each rounding; of several seeds mean and spread."""
    lines = [f"Perplexity of the reported text; intact {intact:.2f}.", ""]
    lines += [
        "| four bits for | stored bits | " + " | ".join(ROUNDINGS) + " |",
        "|---|---:|" + "---:|" * len(ROUNDINGS),
    ]
    for choice in dict.fromkeys(row["choice"] for row in rows):
        cells, mine = [], [row for row in rows if row["choice"] == choice]
        for rounding in ROUNDINGS:
            values = [row["perplexity"] for row in mine if row["rounding"] == rounding]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "-")
        lines.append(f"| {choice} | {mine[0]['bits']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    parser = table_parser(__doc__)
    parser.set_defaults(model="allenai/OLMoE-1B-7B-0924")
    parser.add_argument("--bits", type=float, default=3.5, help="stored bits per weight, scales included")
    parser.add_argument("--choices", nargs="+", default=[*choices()], choices=[*choices()])
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=list(ROUNDINGS))
    parser.add_argument("--seeds", type=int, default=3, help="number of random choices")
    parser.add_argument("--output", default="expert-bits", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    output, bench = Path(arguments.output), Bench(arguments)
    cells = ("output", "choices", "roundings", "seeds")
    journal = Journal(
        output / "journal.jsonl", fingerprint({k: v for k, v in vars(arguments).items() if k not in cells})
    )
    if "intact" not in journal:
        journal.add("intact", perplexity(bench.model, bench.report))
    intact, rows = journal["intact"], []
    for choice in arguments.choices:
        for rounding in arguments.roundings:
            for seed in range(arguments.seeds if choice.endswith(RANDOM) else 1):
                key = f"{choice} {rounding} {seed}"
                if key not in journal:
                    journal.add(key, bench.measure(choice, rounding, seed))
                found, bits = journal[key]
                rows.append({"choice": choice, "rounding": rounding, "seed": seed, "perplexity": found, "bits": bits})
                print(f"{choice}, {rounding}: {found:.2f} at {bits:.2f} bits", flush=True)
                write_json(output / "table.json", {"settings": vars(arguments), "intact": intact, "rows": rows})
                write_text(output / "table.md", markdown(rows, intact))


if __name__ == "__main__":
    main()
