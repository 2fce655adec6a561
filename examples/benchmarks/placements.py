"""Cost of norm placements: time, memory and kernels of a training step, relative to a stock Llama of the same size.

    python examples/benchmarks/placements.py
    python examples/benchmarks/placements.py --size 130M --batch 16 --tokens 256 --device cuda --dtype bfloat16

All models are in one process and take steps in turns, in another order each round. Ratios are computed within a round
and their median over rounds is printed, so that load on the machine affects both sides of a ratio. `pre` computes the
same function as the stock model: the difference of its ratio from 1 is the error of the measurement.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from allocator import peak_added
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cod.io.files import write_json
from hf_cod.models import LLAMA_PRESETS, PLACEMENTS, CodLlamaForCausalLM, llama_preset

STOCK = "stock"
TARGETS = {"lns": 1.01, "mix": 1.05, "post": 1.05, "sandwich": 1.05}
# A size for quick runs on a CPU; the others are those of the papers. With the small vocabulary the layers dominate.
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
SMALL_VOCABULARY = 2048
# Modifiers of a placement, as "pre+gpas" -> fields of the config.
MODIFIERS = {"gpas": {"gpas": True}, "layer_scale": {"layer_scale": 1.0}}
NAMES = [*PLACEMENTS, *(f"pre+{name}" for name in MODIFIERS)]
# Leaf operations that allocate or rename memory and compute nothing.
NO_KERNELS = ("empty", "view", "as_strided", "reshape", "alias", "detach", "result_type", "_local_scalar_dense")


def build(name: str, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model in train mode, and its optimizer; `name` is of `NAMES`, or "stock"."""
    small = {**SMALL, "vocab_size": SMALL_VOCABULARY} if args.size == "small" else {}
    size = "130M" if args.size == "small" else args.size
    placement, _, modifier = name.partition("+")
    modified = {**small, **MODIFIERS.get(modifier, {})}
    config = llama_preset(size, "pre" if name == STOCK else placement, use_cache=False, **modified)
    torch.manual_seed(0)
    if name == STOCK:
        names = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
        stock = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key in names})
        model: torch.nn.Module = LlamaForCausalLM(stock)
    else:
        model = CodLlamaForCausalLM(config)
    model = model.to(args.device, getattr(torch, args.dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return torch.compile(model) if args.compile else model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Seconds of one training step."""
    if batch.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels_and_memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> dict[str, Any]:
    """Number of operations of one step, and its peak memory, including weights and optimizer state."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step(model, optimizer, batch)
    leaves = [e.name for e in profiler.events() if e.name.startswith("aten::") and not e.cpu_children]
    kernels = sum(not any(word in name for word in NO_KERNELS) for name in leaves)
    states = [value for state in optimizer.state.values() for value in state.values()]
    peak = peak_added(profiler, batch.is_cuda) + sum(tensor.nbytes for tensor in (*model.parameters(), *states))
    return {"kernels": kernels, "peak_mib": peak / 2**20}


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """name -> seconds, ratio to the stock model, kernels and memory."""
    names = [STOCK, *args.placements]
    trained = {name: build(name, args) for name in names}
    batch = torch.randint(SMALL_VOCABULARY, (args.batch, args.tokens), device=args.device)
    for name in names:  # warm-up and, if requested, compilation
        for _ in range(3):
            step(*trained[name], batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(args.rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(step(*trained[name], batch))
    results = {}
    for name in names:
        ratios = [mine / stock for mine, stock in zip(seconds[name], seconds[STOCK], strict=True)]
        timing = {"seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios)}
        results[name] = {**timing, **kernels_and_memory(*trained[name], batch)}
    for name in names:
        results[name]["extra_kernels"] = results[name]["kernels"] - results[STOCK]["kernels"]
        results[name]["memory_ratio"] = results[name]["peak_mib"] / results[STOCK]["peak_mib"]
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text."""
    head = f"{'':16} {'ms a step':>10} {'ratio':>7} {'target':>7} {'extra kernels':>14} {'peak MiB':>9} {'ratio':>7}"
    rows = [
        f"{name:16} {1000 * r['seconds']:10.1f} {r['ratio']:7.3f} {TARGETS.get(name, ''):>7} "
        f"{r['extra_kernels']:+14d} {r['peak_mib']:9.1f} {r['memory_ratio']:7.3f}"
        for name, r in results.items()
    ]
    return "\n".join([head, *rows])


def main() -> None:
    """Parses the arguments, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", *LLAMA_PRESETS], default="small")
    parser.add_argument("--placements", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    results = measure(args)
    print(table(results))
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__}
        write_json(args.output, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
