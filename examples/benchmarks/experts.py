"""Cost of a bank of experts in three and four bits: time and peak memory of a forward pass for one token and a prompt.

The bank is that of Qwen3-MoE, with random weights, run by transformers' `grouped_mm`. Compared are the dense bank,
QuantizedExperts of three bits, of four, and half of the experts of each, and bitsandbytes' way: a parameter in NF4 that
is decoded whole at each use. In each call a token goes to other experts, so that caches do not hold their weights.
Kinds run in turns within a round, and ratios are medians over rounds. Memory is that of the tensors that a pass
creates, at its peak, beyond weights and inputs; on a GPU it is the allocator's. Its last two columns have it in experts
(bytes of one in the dtype): all of it, and what is beyond the dense bank's, which are the activations.

    python examples/benchmarks/experts.py --output experts.json
    python examples/benchmarks/experts.py --experts 8 --top-k 2 --hidden 512 --intermediate 256 --rounds 2   # small
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_cod.compression.quantization.rounding import Rounding, fill, new_experts
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import width_of
from hf_cod.io.files import write_json
from hf_cod.layers.experts import expert_matrices
from hf_cod.layers.replacement_modules import replace
from hf_cod.training.runs.memory import LiveStorages

DENSE, WHOLE = "dense", "bitsandbytes NF4"
OURS = {"3 bits": "3", "3.5 bits": "34", "4 bits": "4"}
KINDS = (DENSE, *OURS, WHOLE)
# Different routings in a round; the weights of so many calls together are larger than the cache of most processors.
CALLS = {1: 32, 512: 1}


def dense_bank(args: argparse.Namespace) -> Qwen3MoeExperts:
    """A bank of random weights."""
    config = Qwen3MoeConfig(
        hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_experts=args.experts, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    bank = Qwen3MoeExperts(config).to(getattr(torch, args.dtype))
    for p in bank.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return bank.requires_grad_(False).eval()


def packed_bank(dense: nn.Module, digits: str) -> nn.Module:
    """The same in the bits of these digits, in turns; scales by the largest magnitudes."""
    model, storage = nn.ModuleDict({"bank": copy.copy(dense)}), StorageSettings()
    bank: Any = model["bank"]
    for name in ("_parameters", "_modules"):
        vars(bank)[name] = dict(vars(dense)[name])
    for matrix in expert_matrices([("bank", bank)]):
        widths = [int(digits[expert % len(digits)]) for expert in range(matrix.experts)]
        module = new_experts(matrix, width_of(widths), storage)
        fill(module, Rounding(matrix.name, widths, storage, None).of_experts(matrix.weights()))
        replace(model, matrix.name, module)
    return bank


def decoded_bank(dense: nn.Module) -> nn.Module:
    """The same with parameters that bitsandbytes decodes whole."""
    bank = copy.deepcopy(dense)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(bank, name, compress_statistics=True, quant_type="nf4", blocksize=64)
    return bank


def banks(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Kind -> bank, all of the same weights."""
    dense = dense_bank(args)
    found = {kind: packed_bank(dense, digits) for kind, digits in OURS.items()}
    found = {DENSE: dense, **found, WHOLE: decoded_bank(dense)}
    return {kind: bank.to(args.device) for kind, bank in found.items()}


def inputs(args: argparse.Namespace, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(hidden states, experts, gate weights) of each call of a round."""
    dtype, generator = getattr(torch, args.dtype), torch.Generator().manual_seed(tokens)
    found = []
    for _ in range(CALLS.get(tokens, 1)):
        x = torch.randn(tokens, args.hidden, generator=generator).to(args.device, dtype)
        index = torch.rand(tokens, args.experts, generator=generator).argsort(1)[:, : args.top_k].to(args.device)
        found.append((x, index, torch.full((tokens, args.top_k), 1 / args.top_k, device=args.device, dtype=dtype)))
    return found


def run_of(bank: nn.Module, calls: list[tuple[Tensor, Tensor, Tensor]], device: str) -> Callable[[], float]:
    """Mean seconds of a call."""

    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            bank(*call)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(calls)

    return run


def peak_of(bank: nn.Module, call: tuple[Tensor, Tensor, Tensor], device: str) -> int:
    """Bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bank(*call)
        return torch.cuda.max_memory_allocated() - before
    counter = LiveStorages()
    counter.add([*bank.parameters(), *bank.buffers(), *call], "weights")
    with counter:
        bank(*call)
    return counter.peak.total() - counter.peak["weights"]


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of tokens and kind."""
    made, rows = banks(args), []
    one = 3 * args.hidden * args.intermediate * getattr(torch, args.dtype).itemsize  # bytes of an expert
    sizes = {kind: sum(t.nbytes for t in bank.state_dict().values()) for kind, bank in made.items()}
    for tokens in args.tokens:
        calls = inputs(args, tokens)
        peaks = {kind: peak_of(bank, calls[0], args.device) for kind, bank in made.items()}  # builds kernels, too
        runs = {kind: run_of(bank, calls, args.device) for kind, bank in made.items()}
        rounds = [{kind: run() for kind, run in runs.items()} for _ in range(args.rounds + 1)][1:]
        for kind in KINDS:
            seconds = statistics.median(found[kind] for found in rounds)
            ratio = statistics.median(found[kind] / found[DENSE] for found in rounds)
            row = {"dtype": args.dtype, "tokens": tokens, "kind": kind, "seconds": seconds, "of dense": ratio}
            peak, beyond = peaks[kind] / one, (peaks[kind] - peaks[DENSE]) / one
            row |= {"weights": sizes[kind], "peak": peaks[kind]}
            rows.append({**row, "peak in experts": peak, "beyond dense in experts": beyond})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    sizes = "".join(f"{row[name] / 2**20:>14.1f}" for name in ("weights", "peak"))
    times = f"{1000 * row['seconds']:>10.2f}{row['of dense']:>12.2f}"
    experts = f"{row['peak in experts']:>17.2f}{row['beyond dense in experts']:>17.2f}"
    return f"{row['dtype']:<8}  {row['tokens']:>6}  {row['kind']:<18}{times}{sizes}{experts}"


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=2048, help="width of a token")
    parser.add_argument("--intermediate", type=int, default=768, help="width of an expert")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], nargs="+", default=["bfloat16", "float32"]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    columns = f"{'ms':>10}{'/ dense':>12}{'weights MiB':>14}{'peak MiB':>14}{'peak / expert':>17}{'beyond dense':>17}"
    print(f"{'dtype':<8}  {'tokens':>6}  {'bank':<18}{columns}")
    rows = [row for dtype in args.dtype for row in measure(argparse.Namespace(**{**vars(args), "dtype": dtype}))]
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__}
        write_json(args.output, {"settings": settings, "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
