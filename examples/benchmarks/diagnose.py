"""Cost of the diagnostics, measured in turns in one process.

(a) The full angular-distance matrix against one bare forward pass, and against the authors' method, a pass for each n.
(b) The sweep that removes each single layer against the naive sweep, which runs the full shorter model each time.

    python examples/benchmarks/diagnose.py --output diagnose.json            # Llama-shaped random weights, 30 layers
    python examples/benchmarks/diagnose.py --model DIRECTORY_OR_HUB_ID       # a real checkpoint

In both sweeps the head and its loss run once for each removal; neither they nor the intact pass can be shared. This
bounds the speed-up of (b); the bound is printed, computed from the measured times of both parts.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cod import find_decoder_layers, skip
from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.analysis.diagnostics.layer_drop import measure_layer_drop
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.io.files import write_json
from hf_cod.io.models import ModelSettings, load_model


def timed(actions: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each round and last result of each action; actions run in turns, so that load affects all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            results[name] = action()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def authors_matrix(model, ids) -> torch.Tensor:
    """One forward pass for each n that keeps all hidden states and compares layers l and l + n."""
    L = model.config.num_hidden_layers
    matrix = torch.full((L, L), math.nan)
    for n in range(1, L + 1):
        with torch.no_grad():
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for l in range(L + 1 - n):  # noqa: E741 - the paper's letter
            x, y = states[l][:, -1], states[l + n][:, -1]
            cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
            matrix[l, n - 1] = (cosine.arccos() / math.pi).mean()
    return matrix


def naive_sweep(model, ids) -> list[float]:
    """Runs the intact model, then removes each layer in turn and runs the full model, each with its own loss."""
    with torch.no_grad():
        model(ids, labels=ids, use_cache=False)
    losses = []
    for layer in range(len(find_decoder_layers(model))):
        with skip(model, layer), torch.no_grad():
            losses.append(float(model(ids, labels=ids, use_cache=False).loss))
    return losses


def check_equal(matrix: torch.Tensor, results: dict[str, Any]) -> None:
    """Checks that both methods give the same results, before their times are compared."""
    L = len(matrix)
    # The authors' method ends with the output of the final norm: only pairs of layers before it are comparable.
    inner = torch.arange(L)[:, None] + torch.arange(1, L + 1) < L
    torch.testing.assert_close(matrix[inner].float(), results["authors' matrix"][inner], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        torch.tensor(results["sweep"]).log(), torch.tensor(results["naive sweep"]), atol=1e-4, rtol=1e-5
    )


def build_model(arguments: argparse.Namespace) -> torch.nn.Module:
    """The given checkpoint, or a random Llama with the proportions of a 7B model: a head of 2 %."""
    if arguments.model:
        return load_model(arguments.model, ModelSettings(dtype="float32"))[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3 // 16 * 16,
        num_attention_heads=arguments.width // 64,
        num_hidden_layers=30,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def peak_memory(arguments: list[str]) -> int:
    """Peak resident bytes of this script with a single pass: median of three processes, since allocators vary."""
    command = [sys.executable, __file__, *arguments]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
    return statistics.median(int(run.stdout.split()[-1]) for run in runs)


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to measure on; default: random weights in Llama's shape")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the random model")
    parser.add_argument("--vocabulary", type=int, default=2048, help="vocabulary of the random model")
    parser.add_argument("--batch-size", type=int, default=2, help="samples")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of single passes; medians are reported")
    parser.add_argument("--slow-rounds", type=int, default=7, help="rounds of the sweeps and of the authors' method")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--only", choices=["forward", "layers", "matrix"], help=argparse.SUPPRESS)  # for peak_memory
    return parser.parse_args()


def single_passes(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The full model, its layers without the head, and the angles of all layer pairs."""
    batches = [{"input_ids": ids}]
    return {
        "forward": torch.no_grad()(lambda: model(ids, use_cache=False)),
        "layers": torch.no_grad()(lambda: model.base_model(ids, use_cache=False).last_hidden_state),
        "matrix": lambda: measure_forward(model, batches, ["angular_distance"]).angular_distance(),
    }


def measure(model: torch.nn.Module, ids: torch.Tensor, rounds: int, slow_rounds: int) -> tuple[dict, dict]:
    """Ratios and median seconds of all measurements in this process."""
    passes = single_passes(model, ids)
    hidden, stack = passes["layers"](), find_decoder_layers(model)
    quick, _ = timed({**passes, "head": torch.no_grad()(lambda: stack.head(hidden))}, rounds)
    metric = find_metric("perplexity", "causal_lm")
    sweeps = {
        "matrix": passes["matrix"],
        "authors' matrix": lambda: authors_matrix(model, ids),
        "naive sweep": lambda: naive_sweep(model, ids),
        "sweep": lambda: measure_layer_drop(model, [{"input_ids": ids}], metric)[1],
    }
    slow, results = timed(sweeps, slow_rounds)
    check_equal(passes["matrix"](), results)
    seconds = {name: statistics.median(values) for name, values in {**slow, **quick}.items()}
    L = len(stack)
    a_layer, head = seconds["layers"] / L, seconds["head"]
    intact = L * a_layer + (L + 1) * head  # the intact pass, and the head of each removal: the same in both sweeps
    ratios = {
        "matrix / bare forward, time": ratio(quick, "matrix", "forward"),
        "matrix / layers alone, time": ratio(quick, "matrix", "layers"),
        "authors' way / matrix, time": ratio(slow, "authors' matrix", "matrix"),
        "naive sweep / sweep, time": ratio(slow, "naive sweep", "sweep"),
        "naive sweep / sweep, bound": (L * (L - 1) * a_layer + intact) / (L * (L - 1) / 2 * a_layer + intact),
    }
    return ratios, seconds


def main() -> None:
    """Measures, prints a table and writes JSON."""
    arguments = parse()
    model = build_model(arguments)
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch_size, arguments.sequence_length))
    if arguments.only:
        single_passes(model, ids)[arguments.only]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    setting = {k: v for k, v in vars(arguments).items() if k not in ("output", "only")}
    passed = [part for k, v in setting.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]
    memory = {only: peak_memory([*passed, "--only", only]) for only in ("forward", "layers", "matrix")}
    ratios, seconds = measure(model, ids, arguments.rounds, arguments.slow_rounds)
    for of, name in (("forward", "bare forward"), ("layers", "layers alone")):
        ratios[f"matrix / {name}, peak memory"] = memory["matrix"] / memory[of]
    for name, value in ratios.items():
        print(f"{name:<40}{value:8.3f}")
    for name, value in seconds.items():
        print(f"{name:<40}{value:8.3f} s")
    if arguments.output:
        write_json(Path(arguments.output), {"settings": setting, "ratios": ratios, "seconds": seconds})


if __name__ == "__main__":
    main()
