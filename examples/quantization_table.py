"""Perplexity at equal stored bits: scores that assign three or four bits to layers, x methods of rounding.

    python examples/quantization_table.py --model MODEL --text TEXT --output table   # SmolLM2-135M: an hour
    python examples/quantization_table.py ... --peers      # also HQQ and optimum-quanto, if they are installed

Scales, scores and the choice of `auto` come from the first half of the text; all reported perplexities are of the
second half. `nearest` rounds without calibration text (4 bits: bitsandbytes' NF4), `weighted` searches scales by the
error of the outputs, `compensated` adds error compensation (GPTQ). An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cod import (
    LayerScores,
    OwlBnbConfig,
    collect_statistics,
    find_decoder_layers,
    perplexity,
    quantize,
    score_layers,
)
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import SampleSettings, TextSettings, load_texts, token_batches
from hf_cod.layers.replacement_modules import replace as replace_module

SCORES = ("depth", "weight_norm", "owl", "angular", "sensitivity", "auto")
ROUNDINGS = ("nearest", "weighted", "compensated")
SEEDS = 5


class Bench:
    """The samples of both halves of the text, and scores and statistics of the first half."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        model, tokenizer = self.load()
        text = "\n".join(load_texts(TextSettings(text=arguments.text)))
        halves = text[: len(text) // 2], text[len(text) // 2 :]
        cut = SampleSettings(sequence_length=arguments.sequence_length, batch_size=4, seed=arguments.seed)
        self.calibration = token_batches(tokenizer, halves[0], replace(cut, max_samples=arguments.calibration_samples))
        self.report = token_batches(tokenizer, halves[1], replace(cut, max_samples=arguments.report_samples))
        self.intact = perplexity(model, self.report)
        self.statistics = collect_statistics(model, self.calibration)

    def load(self) -> tuple[Any, Any]:
        """The intact model and its tokenizer."""
        return load_model(self.arguments.model, ModelSettings(dtype=self.arguments.dtype))

    def scores(self, method: str, seed: int) -> LayerScores:
        """Computed on the first half."""
        options: dict[str, Any] = {"seed": seed} if method == "random" else {}
        if method in ("sensitivity", "auto"):
            options |= {"pruner": "codebook", "target": self.arguments.bits}
        return score_layers(self.load()[0], self.statistics, method, batches=self.calibration, **options)

    def measure(self, bits: float, rounding: str, scores: LayerScores | None) -> tuple[float, float]:
        """(perplexity on the second half, stored bits per weight)."""
        model, _ = self.load()
        config = OwlBnbConfig(bits=bits, scores=scores)
        if rounding == "weighted":
            config.statistics = self.statistics
        report = quantize(model, config, batches=self.calibration if rounding == "compensated" else None)
        model.dequantize()  # the same weights, decoded once and not in each forward pass
        return perplexity(model, self.report), report.results["bits"]

    def measure_peer(self, exchange: Callable[[nn.Linear], tuple[nn.Module, float]]) -> tuple[float, float]:
        """The same for layers of another library: `exchange` converts a Linear and returns its stored bits."""
        model, _ = self.load()
        stack = find_decoder_layers(model)
        bits, weights = 0.0, 0
        with torch.no_grad():
            for index in range(len(stack)):
                for name, linear in stack.linears(index).items():
                    size = linear.weight.numel()  # type: ignore[union-attr, operator]
                    module, stored = exchange(linear)  # type: ignore[arg-type]
                    replace_module(model, name, module)
                    bits, weights = bits + stored, weights + size  # type: ignore[assignment, operator]
        return perplexity(model, self.report), bits / weights


def peers() -> dict[str, Callable[[nn.Linear], tuple[nn.Module, float]]]:
    """Name -> exchange, of the libraries that are installed."""
    found: dict[str, Callable[[nn.Linear], tuple[nn.Module, float]]] = {}
    try:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError:
        print("HQQ is not installed: pip install hqq")
    else:

        def hqq(linear: nn.Linear, width: int) -> tuple[nn.Module, float]:
            config = BaseQuantizeConfig(nbits=width, group_size=64)
            made = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
            meta = [t for t in made.meta.values() if isinstance(t, torch.Tensor)]
            # Its scales and zeros are counted as 16 bits, which are sufficient, although they are float32 here.
            return made, 8.0 * made.W_q.numel() * made.W_q.element_size() + 16.0 * sum(t.numel() for t in meta)

        found |= {f"HQQ {width} bits": lambda linear, width=width: hqq(linear, width) for width in (3, 4)}
    try:
        from optimum.quanto import QLinear, qint4
    except ImportError:
        print("optimum-quanto is not installed: pip install optimum-quanto")
    else:

        def quanto(linear: nn.Linear) -> tuple[nn.Module, float]:
            made = QLinear.from_module(linear, weights=qint4)
            made.freeze()
            tensors = made.weight.__tensor_flatten__()[0]
            inner = [getattr(made.weight, name) for name in tensors]
            data, *scales = [getattr(t, "_data", t) for t in inner]
            return made, 8.0 * data.numel() * data.element_size() + 16.0 * sum(t.numel() for t in scales)

        found["optimum-quanto qint4"] = quanto
    return found


def markdown(rows: list[dict[str, Any]], intact: float) -> str:
    """The table as a page: a row for each choice of layers, a column for each rounding."""
    lines = [f"Perplexity of the second half of the text; intact {intact:.1f}.", ""]
    lines += [
        "| choice of layers | stored bits | " + " | ".join(ROUNDINGS) + " |",
        "|---|---:|" + "---:|" * len(ROUNDINGS),
    ]
    choices = dict.fromkeys(row["choice"] for row in rows)
    for choice in choices:
        mine = [row for row in rows if row["choice"] == choice]
        cells = []
        for rounding in ROUNDINGS:
            values = [row["perplexity"] for row in mine if row["rounding"] == rounding]
            if len(values) > 1:
                cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
            else:
                cells.append(f"{values[0]:.1f}" if values else "-")
        lines.append(f"| {choice} | {mine[0]['bits']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Computes the table cell by cell, and writes it after each cell."""
    arguments = _arguments()
    output = Path(arguments.output)
    cells = ("output", "scores", "roundings", "seeds", "peers", "no_mixtures", "bits")
    settings = {key: value for key, value in vars(arguments).items() if key not in cells}
    journal = Journal(output / "journal.jsonl", fingerprint(settings))
    bench, rows = Bench(arguments), []

    def fill(choice: str, rounding: str, key: str, measure: Callable[[], tuple[float, float]]) -> None:
        if key not in journal:
            journal.add(key, measure())
        found, bits = journal[key]
        rows.append({"choice": choice, "rounding": rounding, "key": key, "perplexity": found, "bits": bits})
        print(key, f"{found:.2f} at {bits:.3f} bits", flush=True)
        write_json(output / "table.json", {"settings": vars(arguments), "intact": bench.intact, "rows": rows})
        write_text(output / "table.md", markdown(rows, bench.intact))

    def scored(method: str, seed: int) -> LayerScores:
        key = f"scores {method} {seed} {arguments.bits if method in ('auto', 'sensitivity') else ''}"
        if key not in journal:
            scores = bench.scores(method, seed)
            journal.add(key, [scores.values, scores.parameters, scores.settings])
        values, parameters, found = journal[key]
        return LayerScores(arguments.model, method, values, parameters, found)

    for rounding in sorted(arguments.roundings, key=ROUNDINGS.index):
        for width in (4, 3):
            fill(
                f"all {width} bits",
                rounding,
                f"all {width} {rounding}",
                lambda w=width, r=rounding: bench.measure(w, r, None),
            )
        choices = [*((m, 0) for m in arguments.scores), *(("random", s) for s in range(arguments.seeds))]
        for method, seed in choices if not arguments.no_mixtures else ():
            key = f"{method} {seed} {rounding} at {arguments.bits}"
            fill(
                method,
                rounding,
                key,
                lambda m=method, s=seed, r=rounding: bench.measure(arguments.bits, r, scored(m, s)),
            )
    for name, exchange in peers().items() if arguments.peers else ():
        fill(name, "nearest", name, lambda e=exchange: bench.measure_peer(e))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, directory or GGUF file")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--bits", type=float, default=3.5, help="stored bits per weight of the mixtures")
    parser.add_argument("--scores", nargs="+", default=list(SCORES))
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=ROUNDINGS)
    parser.add_argument("--no-mixtures", action="store_true", help="only uniform bits, and peers")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of random choices of layers")
    parser.add_argument("--peers", action="store_true", help="also measure HQQ and optimum-quanto")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--calibration-samples", type=int, default=32, help="samples of the first half")
    parser.add_argument("--report-samples", type=int, default=32, help="samples of the second half")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--output", default="quantization-table", help="directory for table.md, table.json, journal")
    return parser.parse_args()


if __name__ == "__main__":
    main()
