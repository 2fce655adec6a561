"""Cost of OWL scores and of pruning: time in turns in one process, peak memory in separate processes (Linux).

(a) OWL's scores from streaming sums against one bare forward pass, and against the authors' method: two passes over
    each layer, and A = |W| * s of all matrices of a layer concatenated.
(b) Order of layers by number of calibration tokens (Spearman's rank correlation with the order by all tokens).
(c) Pruning by each method, layer by layer; with --llm-compressor also by its Wanda and SparseGPT, if installed.

    python examples/benchmarks/owl.py --output owl.json                   # Llama-shaped random weights, 30 layers
    python examples/benchmarks/owl.py --model DIRECTORY_OR_HUB_ID --text TEXT
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diagnose import build_model, ratio, timed
from transformers import AutoTokenizer

from hf_cod import collect_statistics, find_decoder_layers, prune, score_layers
from hf_cod.compression.pruning.methods import METHODS
from hf_cod.functional.depth import spearman
from hf_cod.io.files import write_json
from hf_cod.io.text import SampleSettings, TextSettings, load_texts, token_batches
from hf_cod.layers.partial_forward import run_layer

M = 5.0


def adds_squares(total: torch.Tensor) -> Any:
    """A hook that adds up the squared inputs of its module."""

    def read(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        total.add_(args[0].flatten(0, -2).square().sum(0))

    return read


@torch.no_grad()
def authors_scores(model: torch.nn.Module, batches: list[dict]) -> list[float]:
    """Layer by layer: a pass with hooks, A of the full layer, and a second pass for the inputs of the next layer."""
    stack = find_decoder_layers(model)
    states: list[Any] = [None] * len(batches)
    ratios = []
    for index in range(len(stack)):
        sums = {name: torch.zeros(m.in_features) for name, m in stack.linears(index).items()}
        handles = [m.register_forward_pre_hook(adds_squares(sums[name])) for name, m in stack.linears(index).items()]
        for number, batch in enumerate(batches):
            run_layer(stack, index, batch, states[number])
        for handle in handles:
            handle.remove()
        A = torch.cat([(W.abs() * sums[name].sqrt()).flatten() for name, W in stack.matrices(index)])
        ratios.append(float((M * A.mean() < A).float().mean()))
        states = [run_layer(stack, index, batch, state) for batch, state in zip(batches, states, strict=True)]
    return ratios


def our_scores(model: torch.nn.Module, batches: list[dict]) -> list[float]:
    """Streaming sums, without materializing A."""
    return score_layers(model, batches=batches, threshold=M).values


@torch.no_grad()
def bare_forward(model: torch.nn.Module, batches: list[dict]) -> None:
    """The minimum cost of any score on activations: one forward pass."""
    for batch in batches:
        model(**batch, use_cache=False)


def llm_compressor(model: torch.nn.Module, batches: list[dict], method: str, tokenizer: Any) -> None:
    """Prunes half of the weights with llm-compressor's modifiers, on the same samples."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    if method == "sparsegpt":
        from llmcompressor.modifiers.obcq import SparseGPTModifier as Modifier
    else:
        Modifier = WandaPruningModifier
    rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    recipe = Modifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])
    limits = {"num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
    oneshot(model=model, dataset=data, recipe=recipe, processor=tokenizer, **limits)


def samples(arguments: argparse.Namespace, model: torch.nn.Module, tokenizer: Any) -> list[dict]:
    """Text for a real model, random tokens for a random one."""
    if tokenizer is not None:
        cut = SampleSettings(arguments.sequence_length, arguments.samples, arguments.batch_size)
        return [{"input_ids": b["input_ids"]} for b in token_batches(tokenizer, _text(arguments), cut)]
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.sequence_length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    return [{"input_ids": part} for part in ids.split(arguments.batch_size)]


def _text(arguments: argparse.Namespace) -> list[str]:
    return list(load_texts(TextSettings(text=arguments.text)))


def peak_memory(arguments: list[str], only: str) -> float:
    """Additional peak resident MiB of one action, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--only", only]
    # glibc returns freed memory at once, so that the peak counts memory in use.
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **prompt})
    return int(done.stdout.split()[-1]) / 2**10


def resident(field: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def print_peak(action: Any) -> None:
    """Additional peak KiB of an action; the peak of loading a model is reset before."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = resident("VmRSS")
    action()
    print(resident("VmHWM") - before)


def tokens_needed(model: torch.nn.Module, batches: list[dict]) -> dict[str, float]:
    """Number of tokens -> Spearman's correlation of D with D of all tokens."""
    whole = torch.tensor(our_scores(model, batches))
    found = {}
    count = 1
    while count < len(batches):
        tokens = sum(batch["input_ids"].numel() for batch in batches[:count])
        found[str(tokens)] = spearman(torch.tensor(our_scores(model, batches[:count])), whole)
        count *= 2
    return found


def actions(model: torch.nn.Module, batches: list[dict], tokenizer: Any = None) -> dict[str, Any]:
    """Name -> action, for timing and for peak memory."""
    found = {
        "bare forward": lambda: bare_forward(model, batches),
        "owl": lambda: our_scores(model, batches),
        "authors' owl": lambda: authors_scores(model, batches),
    }
    for method in METHODS:
        found[f"prune {method}"] = lambda method=method: prune(model, 0.5, method, batches=batches)
    for method in ("wanda", "sparsegpt"):
        found[f"llm-compressor {method}"] = lambda method=method: llm_compressor(model, batches, method, tokenizer)
    return found


def time_pruning(model: torch.nn.Module, batches: list[dict], tokenizer: Any, other: bool) -> dict[str, float]:
    """Seconds of each method on a copy of the model."""
    seconds = {}
    for name in actions(model, batches):
        if name.startswith("prune") or (other and name.startswith("llm-compressor")):
            action = actions(copy.deepcopy(model), batches, tokenizer)[name]
            start = time.perf_counter()
            action()
            seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to measure on; default: random weights in Llama's shape")
    parser.add_argument("--text", help="text file or dataset for a checkpoint; default: an embedded novel")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the random model")
    parser.add_argument("--vocabulary", type=int, default=2048, help="vocabulary of the random model")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--batch-size", type=int, default=4, help="samples per forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of scoring; medians are reported")
    parser.add_argument("--llm-compressor", action="store_true", help="also run its Wanda and SparseGPT")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # for peak_memory
    arguments = parser.parse_args()
    model = build_model(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model) if arguments.model else None
    if arguments.llm_compressor and tokenizer is None:
        parser.error("--llm-compressor requires --model, because it requires a tokenizer")
    batches = samples(arguments, model, tokenizer)
    if arguments.only:
        few = [{"input_ids": batches[0]["input_ids"][:1, :16]}]
        actions(model, few, tokenizer)[arguments.only]()  # warm-up: imports and initialisation
        print_peak(actions(model, batches, tokenizer)[arguments.only])
        return

    scoring = {k: v for k, v in actions(model, batches).items() if k in ("bare forward", "owl", "authors' owl")}
    collect_statistics(model, batches[:1])  # warms up
    seconds, results = timed(scoring, arguments.rounds)
    torch.testing.assert_close(torch.tensor(results["owl"]), torch.tensor(results["authors' owl"]), atol=2e-6, rtol=0)
    setting = {k: v for k, v in vars(arguments).items() if k not in ("output", "only", "llm_compressor")}
    passed = [part for k, v in setting.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]
    pruning = time_pruning(model, batches, tokenizer, arguments.llm_compressor)
    memory = {name: peak_memory(passed, name) for name in [*scoring, *pruning]}
    ours, theirs = (memory[name] - memory["bare forward"] for name in ("owl", "authors' owl"))
    figures = {
        "owl / bare forward, time": ratio(seconds, "owl", "bare forward"),
        "authors' owl / owl, time": ratio(seconds, "authors' owl", "owl"),
        "owl beyond bare forward, peak MiB": ours,
        "authors' owl beyond bare forward, peak MiB": theirs,
        "authors' owl / owl, peak beyond bare forward": theirs / max(ours, 1.0),  # resolution: 1 MiB
    }
    found = {name: statistics.median(values) for name, values in seconds.items()} | pruning
    needed = tokens_needed(model, batches)
    for name, value in figures.items():
        print(f"{name:<44}{value:10.3f}")
    for name, value in found.items():
        print(f"{name:<44}{value:10.2f} s, peak {memory[name]:8.0f} MiB beyond the model")
    for tokens, value in needed.items():
        print(f"order of layers from {tokens:>6} tokens{value:20.3f}")
    if arguments.output:
        content = {"settings": setting, "ratios": figures, "seconds": found, "peak_mib": memory, "spearman": needed}
        write_json(Path(arguments.output), content)


if __name__ == "__main__":
    main()
