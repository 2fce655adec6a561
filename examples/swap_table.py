"""Which layers does a fine-tune change in a way that matters? Layers of a fine-tuned model, put into the intact one.

    python examples/swap_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

Trains all weights on the first samples of the text (AdamW, constant rate, float32 weights, in bfloat16 by autocast),
then measures the loss of the intact model on other samples with layers of the trained one, as `hf-cod compare --swap`
does. An interrupted run resumes, the training from its start.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_cod import RunReport, measure_swap
from hf_cod.analysis.evaluation.likelihood import negative_log_likelihood
from hf_cod.io.files import write_json, write_text
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.io.text import Batch, SampleSettings, TextSettings, load_texts, split_samples, token_batches
from hf_cod.layers.task import targets

PARTS = ("swap_single", "swap_bottom", "swap_top")


def trained(model: Any, batches: Sequence[Batch], rate: float, seed: int) -> Any:
    """A copy of the model after one step on each batch."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate)
    for step, batch in enumerate(batches):
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = tuned(**batch, use_cache=False).logits
        loss = negative_log_likelihood(logits.float(), targets(batch, "causal_lm")).sum() / (
            batch["input_ids"].numel() - len(batch["input_ids"])
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return tuned.eval()


def table(report: RunReport) -> list[str]:
    """A Markdown table of the change of the loss by layer, after a line of the losses."""
    found = report.results["swap"]
    told = ", ".join(f"{name} {found[name]:.3f}" for name in ("intact", "donor", "all"))
    lines = [
        f"Loss in nats per token: {told}.",
        "",
        "| layer | alone | up to it | from it on |",
        "|---:|---:|---:|---:|",
    ]
    for layer in range(report.n_layers):
        lines.append(f"| {layer} | {' | '.join(f'{report.layers[part][layer]:+.4f}' for part in PARTS)} |")
    return lines


def main() -> None:
    """Trains, measures, and writes table.md and table.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, directory or GGUF file")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="training steps, one batch each")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--samples", type=int, default=16, help="samples on which losses are measured")
    parser.add_argument("--dtype", default="float32", help="dtype in which losses are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="swap-table", help="directory of journal, report and table")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    model, tokenizer = load_model(arguments.model, ModelSettings(dtype="float32"))
    cut = SampleSettings(
        sequence_length=arguments.sequence_length,
        max_samples=arguments.steps * arguments.batch_size + arguments.samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    batches = token_batches(tokenizer, load_texts(TextSettings(text=arguments.text)), cut)
    seen, unseen = split_samples(batches, arguments.steps * arguments.batch_size)
    tuned = trained(model, seen, arguments.rate, arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    names = {"name": Path(arguments.model).name, "donor_name": f"{Path(arguments.model).name}, fine-tuned"}
    report = measure_swap(model.to(dtype), tuned.to(dtype), batches=unseen, output=output, show_progress=True, **names)
    write_json(output / "table.json", {"layers": report.layers, "results": report.results})
    lines = [*report.summary, *report.notes, "", *table(report)]
    write_text(output / "table.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
