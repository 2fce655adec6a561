"""Quality and cost of fine-tuning methods, each at its own best learning rate from one grid.

    python examples/benchmarks/finetune.py --model DIRECTORY_OR_HUB_ID --output finetune         # SmolLM2-135M
    python examples/benchmarks/finetune.py --model DIRECTORY_OR_HUB_ID --memory
    python examples/benchmarks/finetune.py --claim-7b                          # no model required; --cuda trains it

--quality, two tasks: `reuters`, eight categories of news (R8, official split) by the first 24 tokens, with a
classification head that every method trains; `text`, the next token of a text. The search starts at the default rate of
a method and moves to the neighbour in the grid with a lower loss on a validation part of the training rows, until there
is none; then further seeds (of head, order and sampled layers) are trained at the best rate, and measured on the
held-out split. Mean and standard deviation over seeds are written to OUTPUT/quality.json and .md. An interrupted run
resumes and reuses results of other processes in OUTPUT: several processes may share it, each with other --methods, and
a run with all methods then writes the table. --memory: the estimate of `hf-cod finetune --estimate`, and the measured
peak of torch's allocator. --time: steps in turns in one process, as ratios to LoRA's. Without any of these, all three.
--rounding: as --quality, for OwLore with weights in bfloat16, rounded stochastically or to nearest, and in float32.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from finetuning_costs import claim_7b, measure_memory, measure_time, memory_table, time_table
from finetuning_tasks import Task, cut, evaluate, reuters, text
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hf_cod import LayerScores, score_layers
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import best_device
from hf_cod.io.text import Batch
from hf_cod.layers.devices import to_device
from hf_cod.layers.task import model_inputs
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import METHODS, set_up

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MAX_GRAD_NORM = 1.0
ROUNDED = ("owlore", "owlore, bfloat16, stochastic", "owlore, bfloat16, nearest")
SCORED = 16  # rows for the scores of layers
THRESHOLD = 13.0  # M of the OWL scores (arXiv 2405.18380)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Batch, batch_size: int, steps: int, seed: int
) -> None:
    """One training in float32, epoch after epoch; warm-up over a tenth of the steps, then a cosine."""
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    done = 0
    while done < steps:
        order = torch.randperm(len(rows["input_ids"]), generator=generator)
        for batch in cut({name: value[order] for name, value in rows.items()}, batch_size):
            if done == steps:
                break
            model(**to_device(batch, device)).loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1


class Sweep:
    """All trainings of one task; each is run once and kept in the journal."""

    def __init__(self, name: str, task: Task, journal: Journal, arguments: argparse.Namespace) -> None:
        self.name, self.task, self.journal, self.arguments = name, task, journal, arguments
        self._scores: LayerScores | None = None

    def scores(self) -> LayerScores:
        """OWL's scores of the model before training."""
        if self._scores is None:
            torch.manual_seed(0)
            few = next(cut(self.task.train, SCORED))
            model = self.task.build().to(best_device())
            batches = [model_inputs(model, batch) for batch in cut(few, 4)]
            self._scores = score_layers(model, batches=batches, threshold=THRESHOLD)
        return self._scores

    def run(self, method: str, rate: float, seed: int, part: str) -> dict[str, float]:
        """Loss and accuracy on `part` ("validation" or "test") after one training; a loss of infinity if it failed."""
        key = f"{self.name} {method} {rate:g} seed {seed} {part}"
        if key not in self.journal:
            self.journal.add(key, self._train(method, rate, seed, part))
            print(
                f"{key}: loss {self.journal[key]['loss']:.4f} accuracy {self.journal[key]['accuracy']:.4f}", flush=True
            )
        return self.journal[key]

    def _train(self, name: str, rate: float, seed: int, part: str) -> dict[str, float]:
        a = self.arguments
        method, dtype, rounding = [*name.split(", "), "float32", "stochastic"][:3]
        settings = OwLoreSettings(n_active=a.n_active, interval=a.interval, rank=a.rank, seed=seed, rounding=rounding)
        scores = self.scores() if METHODS[method].needs_scores else None
        torch.manual_seed(seed)
        built = self.task.build().to(best_device(), getattr(torch, dtype))
        model, optimizer = set_up(method, built, scores, settings, rate, a.lora_rank)
        try:
            train(model, optimizer, self.task.train, self.task.batch_size, a.steps, seed)
        except ValueError as error:  # gradients that were not finite too often
            print(f"{name} at {rate:g}: {error}", flush=True)
            return {"loss": math.inf, "accuracy": 0.0}
        found = evaluate(model, self.task.kind, getattr(self.task, part))
        return found if math.isfinite(found["loss"]) else {"loss": math.inf, "accuracy": 0.0}

    def row(self, method: str) -> dict[str, Any]:
        """Best rate, and the results of the seeds at it."""
        start = METHODS[method.split(", ")[0]].learning_rate
        rates = sorted(self.arguments.rates)
        best = lowest(rates, start, lambda rate: self.run(method, rate, 0, "validation")["loss"])
        runs = [self.run(method, best, seed, "test") for seed in range(1, self.arguments.seeds + 1)]
        figures = {name: [run[name] for run in runs] for name in ("loss", "accuracy")}
        return {"task": self.name, "method": method, "rate": best, "edge": best in (rates[0], rates[-1]), **figures}


def lowest(rates: Sequence[float], start: float, cost: Callable[[float], float]) -> float:
    """A rate whose neighbours are both worse, found by descent from the rate nearest to `start`."""
    here = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / start)))
    while True:
        around = [i for i in (here, here - 1, here + 1) if 0 <= i < len(rates)]
        best = min(around, key=lambda i: cost(rates[i]))
        if best == here:
            return rates[here]
        here = best


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as a page."""
    lines = ["| task | method | learning rate | held-out loss | accuracy |", "|---|---|---:|---:|---:|"]
    for row in rows:
        rate = f"{row['rate']:g}" + (" (the grid's edge)" if row["edge"] else "")
        lines.append(
            f"| {row['task']} | `{row['method']}` | {rate} | {spread(row['loss'], 3)} | {spread(row['accuracy'], 3)} |"
        )
    return "\n".join([*lines, ""])


def build_tasks(a: argparse.Namespace) -> dict[str, Task]:
    """The selected tasks."""
    makers = {
        "reuters": lambda: reuters(a.model, a.tokens, (a.train_rows, a.validation_rows, a.test_rows)),
        "text": lambda: text(a.model, a.text, a.text_tokens, (a.validation_windows, a.test_windows)),
    }
    return {name: makers[name]() for name in a.tasks}


def measure_quality(a: argparse.Namespace, methods: Sequence[str], file: str) -> None:
    """Computes the table row by row, and writes it after each row."""
    shown = ("model", "text", "steps", "tokens", "train_rows", "validation_rows", "test_rows", "text_tokens")
    shown += ("validation_windows", "test_windows", "n_active", "interval", "rank", "lora_rank")
    settings = {name: getattr(a, name) for name in shown}
    journal = Journal(a.output / "journal.jsonl", fingerprint(settings))
    rows = []
    for name, task in build_tasks(a).items():
        sweep = Sweep(name, task, journal, a)
        for method in methods:
            rows.append(sweep.row(method))
            told = {**settings, "rates": a.rates, "seeds": a.seeds, "torch": torch.__version__}
            write_json(a.output / f"{file}.json", {"settings": told, "rows": rows})
            write_text(a.output / f"{file}.md", markdown(rows))
    print(markdown(rows))


def measure_costs(a: argparse.Namespace) -> None:
    """Memory and time, as tables and JSON."""
    shown = ("model", "n_active", "interval", "rank", "lora_rank", "cost_batch", "cost_tokens")
    settings = {name: getattr(a, name) for name in shown}
    told = {**settings, "torch": torch.__version__}
    if a.memory:
        journal = Journal(a.output / "journal.jsonl", fingerprint(settings))
        rows = measure_memory(a, journal)
        write_json(a.output / "memory.json", {"settings": told, "rows": rows})
        print(memory_table(rows))
    if a.time:
        rows = measure_time(a)
        told |= {"rounds": a.rounds, "checkpointing": a.cost_checkpointing, "threads": torch.get_num_threads()}
        write_json(a.output / "time.json", {"settings": told, "rows": rows})
        print(time_table(rows))
    if a.claim_7b:
        rows, verdict = claim_7b(a.methods, a.cuda)
        write_json(a.output / "claim-7b.json", {"rows": rows, "verdict": verdict})
        print(memory_table(rows, 1e9, "GB"), verdict, sep="\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or directory")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tasks", nargs="+", default=["reuters", "text"], choices=["reuters", "text"])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="the grid of learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings at the best rate")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per training")
    parser.add_argument("--tokens", type=int, default=24, help="reuters: tokens per document")
    parser.add_argument("--train-rows", type=int, default=320, help="reuters: documents for training")
    parser.add_argument("--validation-rows", type=int, default=160, help="reuters: documents for the choice of rates")
    parser.add_argument("--test-rows", type=int, default=400, help="reuters: documents for reported results")
    parser.add_argument("--text", help="text: a file or dataset; default: the embedded novel")
    parser.add_argument("--text-tokens", type=int, default=128, help="text: tokens per window")
    parser.add_argument("--validation-windows", type=int, default=16, help="text: windows for the choice of rates")
    parser.add_argument("--test-windows", type=int, default=32, help="text: windows for reported results")
    parser.add_argument("--n-active", type=int, default=4, help="number of layers that are trained at a time")
    parser.add_argument("--interval", type=int, default=5, help="steps between samplings of layers")
    parser.add_argument("--rank", type=int, default=64, help="rank of projected gradients")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--quality", action="store_true", help="measure the quality of the methods")
    parser.add_argument("--rounding", action="store_true", help="measure the effect of stochastic rounding")
    parser.add_argument("--memory", action="store_true", help="measure memory")
    parser.add_argument("--time", action="store_true", help="measure time")
    parser.add_argument("--claim-7b", action="store_true", help="estimate the memory of LLaMA2-7B")
    parser.add_argument("--cuda", action="store_true", help="7B: also train each method on the CUDA device")
    parser.add_argument("--cost-batch", type=int, default=4, help="memory, time: samples per step")
    parser.add_argument("--cost-tokens", type=int, default=256, help="memory, time: tokens per sample")
    parser.add_argument("--cost-checkpointing", action="store_true", help="time: with activation checkpointing")
    parser.add_argument("--rounds", type=int, default=20, help="time: steps of each method")
    parser.add_argument("--output", type=Path, default=Path("hf-cod-finetuning"), help="directory for results")
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {chosen.seeds}")
    if chosen.claim_7b and "owlore" not in chosen.methods:
        parser.error(f"--claim-7b: expected owlore among --methods, got {chosen.methods}; the claim is about owlore")
    if not (chosen.quality or chosen.rounding or chosen.memory or chosen.time or chosen.claim_7b):
        chosen.quality = chosen.memory = chosen.time = True
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the selected measurements."""
    disable_progress_bar()  # of loading weights, once per training
    set_verbosity_error()  # no warning about the new classification head
    chosen = parse(arguments)
    if chosen.quality:
        measure_quality(chosen, chosen.methods, "quality")
    if chosen.rounding:
        measure_quality(chosen, ROUNDED, "rounding")
    measure_costs(chosen)


if __name__ == "__main__":
    main()
