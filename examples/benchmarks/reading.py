"""Cost of the checks in LayerStatistics.load, as a ratio to reading the same file without a check.

    python examples/benchmarks/reading.py
    python examples/benchmarks/reading.py --hidden 2048 --intermediate 8192

The file has the sums of a Llama's matrices. "plain" loads it by safetensors and makes the same object, with neither
size, metadata, names, types, ranges nor signs checked; "mapped" does it by `safe_open`, tensor by tensor. Each round
reads the file once in each way, in another order; the medians of seconds, and of the ratios of each round, are printed.
The file is in the cache of the operating system, where checks cost most.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from hf_cod import LayerStatistics
from hf_cod.io.files import write_json


def make(path: Path, layers: int, hidden: int, intermediate: int) -> None:
    """Writes statistics of random sums."""
    inputs = {f"self_attn.{name}_proj": hidden for name in "qkvo"}
    inputs |= {"mlp.gate_proj": hidden, "mlp.up_proj": hidden, "mlp.down_proj": intermediate}
    names = {f"model.layers.{i}.{name}": width for i in range(layers) for name, width in inputs.items()}
    squares = {name: torch.rand(width, dtype=torch.float64) for name, width in names.items()}
    LayerStatistics("m", "model.layers", squares, {name: torch.tensor(4096) for name in names}).save(path)


def plain(path: Path) -> LayerStatistics:
    """Reads the file without a check."""
    with safetensors.safe_open(path, "pt") as file:
        told = file.metadata()
    return _of(told, load(path.read_bytes()).items())


def mapped(path: Path) -> LayerStatistics:
    """Reads the file without a check, tensor by tensor."""
    with safetensors.safe_open(path, "pt") as file:
        return _of(file.metadata(), [(key, file.get_tensor(key)) for key in file.keys()])  # noqa: SIM118 - not a dict


def _of(told: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> LayerStatistics:
    kinds: dict[str, dict[str, Tensor]] = {"squares": {}, "tokens": {}}
    for key, tensor in tensors:
        kind, _, name = key.partition("/")
        kinds[kind][name] = tensor
    return LayerStatistics(told["model"], told["layers_path"], **kinds)


WAYS: dict[str, Callable[[Path], LayerStatistics]] = {"checked": LayerStatistics.load, "plain": plain, "mapped": mapped}


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Reads the file in all ways in turns; returns medians of seconds and of ratios to "plain"."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    order = random.Random(0)
    for _ in range(rounds + 1):
        for name in order.sample([*WAYS], len(WAYS)):
            start = time.perf_counter()
            WAYS[name](path)
            seconds[name].append(time.perf_counter() - start)
    found = {name: values[1:] for name, values in seconds.items()}  # the first round fills caches
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, found["plain"], strict=True)),
            "ratio of the least": min(values) / min(found["plain"]),
        }
        for name, values in found.items()
    }


def main() -> None:
    """Parses the arguments, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576, help="width of the model; default: that of SmolLM2-135M")
    parser.add_argument("--intermediate", type=int, default=1536, help="width of the MLP; default: its")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        make(path, args.layers, args.hidden, args.intermediate)
        results, size = measure(path, args.rounds), path.stat().st_size
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(f"{args.layers} layers, {size / 1e6:.2f} MB, {args.rounds} rounds, load of the machine {load_average}")
    print(f"{'':<10}{'ms':>8}{'/ plain':>10}{'of the least':>14}")
    for name, row in results.items():
        print(f"{name:<10}{row['seconds'] * 1e3:8.3f}{row['ratio']:10.4f}{row['ratio of the least']:14.4f}")
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__, "bytes": size}
        write_json(args.output, {"settings": {**settings, "load": load_average}, "results": results})


if __name__ == "__main__":
    main()
