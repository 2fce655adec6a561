"""Which measure of a layer predicts the cost of its removal? All measures of `hf-cod diagnose`, and rank correlations.

    python examples/measures_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

The layer drop is measured on the same text as the other measures. For each measure, the table has Spearman's rank
correlation, over layers, of its values with the harm of the removal of each single layer, and a 95 % interval by the
percentile bootstrap over layers. Further correlations leave out the first two layers and the last one, whose removal is
the most harmful in most models. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cod import RunReport, diagnose
from hf_cod.analysis.diagnostics.more_measures import PREDICTORS
from hf_cod.functional.depth import spearman
from hf_cod.io.files import write_json, write_text
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.report import format_number
from hf_cod.io.text import TextSettings, load_texts

DRAWS = 1000
# Layers at the start and at the end that the second correlation leaves out.
ENDS = (2, 1)


def correlated(harm: Tensor, values: Tensor, seed: int) -> list[float]:
    """Spearman's correlation, and the ends of its interval over layers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(harm), (DRAWS, len(harm)), generator=generator)
    found = torch.tensor([spearman(harm[layers], values[layers]) for layers in drawn], dtype=torch.float64)
    return [spearman(harm, values), *torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()]


def correlations(report: RunReport, seed: int) -> dict[str, dict[str, list[float]]]:
    """Measure -> correlation with the harm of removal over all layers, and over those between the ends."""
    sign = 1 if report.results["layer_drop"]["lower_is_better"] else -1
    harm = [sign * value for value in report.layers["layer_drop"]]
    found: dict[str, dict[str, list[float]]] = {}
    for name in (name for name in PREDICTORS if name in report.layers):
        known = [(i, a, b) for i, (a, b) in enumerate(zip(harm, report.layers[name], strict=True)) if b is not None]
        inner = [row for row in known if ENDS[0] <= row[0] < report.n_layers - ENDS[1]]
        found[name] = {}
        for part, rows in (("all layers", known), ("inner layers", inner)):
            if len(rows) > 1:
                pairs = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
                found[name][part] = correlated(pairs[:, 0], pairs[:, 1], seed)
    return found


def table(report: RunReport, found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Two Markdown tables: the correlations, and the values of each layer."""
    lines = ["| measure | all layers | inner layers |", "|---|---:|---:|"]
    for name in sorted(found, key=lambda name: -found[name]["all layers"][0]):
        cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in found[name].values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    names = ["layer_drop", *(name for name in report.layers if name != "layer_drop")]
    lines += ["", f"| layer | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append(f"|---:{'|---:' * len(names)}|")
    for i in range(report.n_layers):
        lines.append(f"| {i} | {' | '.join(format_number(report.layers[name][i]) for name in names)} |")
    return lines


def main() -> None:
    """Measures, and writes table.md and table.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, directory or GGUF file")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--samples", type=int, default=32, help="number of samples")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    parser.add_argument("--device", help="device of the model; default: the CPU")
    parser.add_argument("--metrics", nargs="+", default=["all"], help="as in hf-cod diagnose, layer_drop among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="measures-table", help="directory of the report and the tables")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
    if arguments.device:
        model.to(arguments.device)
    options: dict[str, Any] = {
        "sequence_length": arguments.sequence_length,
        "max_samples": arguments.samples,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    texts = load_texts(TextSettings(text=arguments.text))
    report = diagnose(model, tokenizer, texts, metrics=arguments.metrics, output=output, **options)
    found = correlations(report, arguments.seed)
    write_json(output / "table.json", {"correlations": found, "layers": report.layers})
    lines = [*report.summary, *report.notes, "", *table(report, found)]
    write_text(output / "table.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
