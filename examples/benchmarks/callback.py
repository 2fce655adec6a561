"""Cost of LayerDiagnosticsCallback: time and peak memory of a training with and without it.

    python examples/benchmarks/callback.py
    python examples/benchmarks/callback.py --size 130M --batch 32 --tokens 256 --device cuda --bf16

Each training runs in a process of its own, with and without the callback in turns, in another order each round, so that
load on the machine affects both equally; medians over rounds are printed. On a noisy machine the times of the
callback's own events are more accurate than the difference of two long runs; both are printed. Time is that of
Trainer.train() from its first step on; plots at the end are included and also listed separately.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_cod import LayerDiagnosticsCallback, llama_preset
from hf_cod.io.files import write_json
from hf_cod.models import LLAMA_PRESETS, CodLlamaForCausalLM

# A size for a CPU; the other sizes are those of the papers.
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 12, "num_attention_heads": 4}
VOCABULARY = 4096
EVENTS = ("on_train_begin", "on_pre_optimizer_step", "on_step_begin", "on_step_end", "on_log", "on_train_end")
TARGETS = {"time": 1.02, "events": 1.02, "memory": 1.05}


class TimedCallback(LayerDiagnosticsCallback):
    """Measures the time of its events in seconds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: dict[str, float] = {}
        for event in EVENTS:
            setattr(self, event, self._timed(event, getattr(self, event)))

    def _timed(self, event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize()
            self.seconds[event] = self.seconds.get(event, 0.0) + time.perf_counter() - start
            return result

        return timed


class Clock(TrainerCallback):
    """Records the start of the training."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the timer, once the model is ready."""
        self.start = time.perf_counter()


def synchronize() -> None:
    """Waits for the device, so that timing includes its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(args: argparse.Namespace, watched: bool) -> dict[str, Any]:
    """One training: its seconds, the seconds of the callback's events, and peak memory in bytes."""
    small = SMALL if args.size == "small" else {}
    config = llama_preset("130M" if args.size == "small" else args.size, "pre", vocab_size=VOCABULARY, **small)
    torch.manual_seed(0)
    model = CodLlamaForCausalLM(config)
    ids = torch.randint(3, VOCABULARY, (args.batch, args.tokens))
    rows = [{"input_ids": row, "labels": row} for row in ids] * args.steps
    samples = torch.randint(3, VOCABULARY, (4, 4, 128))  # as large as the callback's default probe of texts
    watch = TimedCallback(every=args.every, probe=[{"input_ids": batch} for batch in samples])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            use_cpu=args.device == "cpu",
            bf16=args.bf16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=args.every,
        )
        callbacks = [clock, watch] if watched else [clock]
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks
        )
        trainer.train()
        synchronize()
        seconds = time.perf_counter() - clock.start
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    events = watch.seconds
    pictures = events.get("on_train_end", 0.0)
    return {"seconds": seconds, "pictures": pictures, "measuring": sum(events.values()) - pictures, "bytes": peak}


def measure(args: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Runs the trainings in turns; returns medians and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    for round_ in range(args.rounds):
        for name in ("with", "without") if round_ % 2 else ("without", "with"):
            command = [sys.executable, __file__, *passed, "--only", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    pairs = list(zip(runs["with"], runs["without"], strict=True))
    alone = statistics.median(run["seconds"] for run in runs["without"])
    measuring = statistics.median(run["measuring"] for run in runs["with"])
    return {
        "seconds without": alone,
        "seconds measuring": measuring,
        "seconds of report and pictures": statistics.median(run["pictures"] for run in runs["with"]),
        "time": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "events": 1 + statistics.median(run["measuring"] + run["pictures"] for run in runs["with"]) / alone,
        "memory": statistics.median(a["bytes"] / b["bytes"] for a, b in pairs),
        "runs": runs,
    }


def main() -> None:
    """Parses the arguments, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", *LLAMA_PRESETS], default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=100, help="interval of the callback in steps; its default is 100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--only", choices=["with", "without"], help=argparse.SUPPRESS)  # one training, as JSON
    args = parser.parse_args()
    if args.only:
        print(json.dumps(train(args, args.only == "with")))
        return
    passed = [
        part
        for name in ("size", "batch", "tokens", "steps", "every", "device")
        for part in (f"--{name}", str(getattr(args, name)))
    ]
    results = measure(args, passed + ["--bf16"] * args.bf16)
    for name in ("seconds without", "seconds measuring", "seconds of report and pictures"):
        print(f"{name:<34}{results[name]:9.2f}")
    for name, text in (
        ("time", "time, with / without"),
        ("events", "time, 1 + all events / without"),
        ("memory", "peak memory, with / without"),
    ):
        print(f"{text:<34}{results[name]:9.4f}   target {TARGETS[name]}")
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__}
        write_json(args.output, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
