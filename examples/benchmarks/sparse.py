"""Time and size of sparse matrices on a CPU, compared with dense matrices of torch in one process.

    python examples/benchmarks/sparse.py                         # Linears of a 7B model, then layers of that shape
    python examples/benchmarks/sparse.py --layers 0              # only the Linears

(a) Each Linear of a 7B Llama at some sparsities, for one token and more, against `torch.nn.Linear` with the same dtype
and weights. The copies of each kind together are several times larger than the processor's cache, and run in turns: in
a model, too, matrices are read from memory in each pass. Dense and packed run in turns; the ratio is the median over
rounds. (b) Greedy generation by a model of 7B-shaped layers with random weights, dense embeddings and head: tokens per
second end to end, and bytes on disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cod import SparseLinear, pack_sparse
from hf_cod.io.files import write_json

SHAPES = {"attention": (4096, 4096), "up, gate": (11008, 4096), "down": (4096, 11008)}  # (out, in)
# Bytes of the packed copies of one matrix together: several times the last-level cache of most processors.
BEYOND_CACHE = 256 * 2**20


def sparse_linear(out_features: int, in_features: int, sparsity: float, dtype: torch.dtype) -> nn.Linear:
    """A Linear with random weights, of which a share, chosen at random, is zero."""
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight, dtype=torch.float32) >= sparsity)
    return linear


def turns(modules: list[nn.Module], x: torch.Tensor) -> Callable[[], float]:
    """Mean seconds of one module, over all modules in turn."""

    def run() -> float:
        start = time.perf_counter()
        for module in modules:
            module(x)
        return (time.perf_counter() - start) / len(modules)

    return run


def paired(dense: Callable[[], float], packed: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians over rounds of both times and of their ratio."""
    dense(), packed()  # warm up
    seconds = [(dense(), packed()) for _ in range(rounds)]
    return {
        "dense": statistics.median(d for d, _ in seconds),
        "packed": statistics.median(p for _, p in seconds),
        "ratio": statistics.median(d / p for d, p in seconds),
    }


def check_equal(linear: nn.Linear, packed: nn.Module, x: torch.Tensor) -> None:
    """Checks that the products are equal up to rounding, before their times are compared."""
    expected = x.double() @ linear.weight.double().T
    limit = 4 * torch.finfo(x.dtype).eps * expected.abs().max()
    assert (packed(x).double() - expected).abs().max() <= limit


@torch.no_grad()
def measure_linears(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each shape, sparsity, dtype and number of tokens."""
    rows = []
    for name, (out_features, in_features) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for sparsity in args.sparsities:
                linear = sparse_linear(out_features, in_features, sparsity, dtype)
                packed = SparseLinear.from_linear(linear)
                check_equal(linear, packed, torch.randn(3, in_features, dtype=dtype))
                size = sum(tensor.nbytes for tensor in packed.buffers())
                copies = max(2, -(-BEYOND_CACHE // size))
                many = [SparseLinear.from_linear(linear) for _ in range(copies)]
                # Dense matrices are larger: half as many copies are sufficient.
                many_dense = [sparse_linear(out_features, in_features, 0, dtype) for _ in range(max(2, copies // 2))]
                for tokens in args.tokens:
                    x = torch.randn(tokens, in_features, dtype=dtype)
                    found = paired(turns(many_dense, x), turns(many, x), args.rounds)
                    kind = {"matrix": name, "dtype": str(dtype)[6:], "sparsity": sparsity, "tokens": tokens}
                    rows.append({**kind, **found, "bytes": size / linear.weight.nbytes})
                    print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    return (
        f"{row['matrix']:<12}{row['dtype']:<10}{row['sparsity']:>6.0%}{row['tokens']:>8}"
        f"{1000 * row['dense']:>12.2f}{1000 * row['packed']:>12.2f}{row['ratio']:>8.2f}{row['bytes']:>9.3f}"
    )


def build_model(layers: int, sparsity: float) -> LlamaForCausalLM:
    """A bfloat16 model of 7B-shaped layers whose matrices are pruned at random."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers, vocab_size=32000
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand(module.weight.shape) >= sparsity)
    return model


def bytes_on_disk(model: LlamaForCausalLM) -> tuple[int, int]:
    """Bytes that save_pretrained writes: in total, and for the layers."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        whole = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    state = model.state_dict()
    return whole, sum(tensor.nbytes for key, tensor in state.items() if ".layers." in key)


@torch.no_grad()
def measure_model(args: argparse.Namespace) -> dict[str, Any]:
    """Generation by a dense model and by the same model packed, in turns."""
    sparsity = args.model_sparsity
    dense = build_model(args.layers, sparsity)
    dense_bytes = bytes_on_disk(dense)
    packed = pack_sparse(build_model(args.layers, sparsity))
    packed_bytes = bytes_on_disk(packed)
    prompt = torch.arange(3, 11)[None]

    def generate(model: LlamaForCausalLM) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False)
            return (time.perf_counter() - start) / args.new_tokens

        return run

    found = paired(generate(dense), generate(packed), args.rounds)
    return {
        "layers": args.layers,
        "sparsity": sparsity,
        "dense tokens a second": 1 / found["dense"],
        "packed tokens a second": 1 / found["packed"],
        "faster": found["ratio"],
        "bytes on disk, whole model, packed / dense": packed_bytes[0] / dense_bytes[0],
        "bytes, layers, packed / dense": packed_bytes[1] / dense_bytes[1],
    }


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="tokens per product")
    parser.add_argument("--layers", type=int, default=8, help="layers of the full model; 0: leave it out")
    parser.add_argument("--model-sparsity", type=float, default=0.7)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    print(f"{'':<12}{'':<10}{'zeros':>6}{'tokens':>8}{'dense ms':>12}{'packed ms':>12}{'ratio':>8}{'bytes':>9}")
    results: dict[str, Any] = {"linears": measure_linears(args)}
    if args.layers:
        results["model"] = measure_model(args)
        for name, value in results["model"].items():
            print(f"{name:<48}{value:.3f}")
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__}
        write_json(args.output, {"settings": settings, "threads": torch.get_num_threads(), **results})


if __name__ == "__main__":
    main()
