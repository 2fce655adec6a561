"""Cost of three and four bits on a CPU: latency compared with bitsandbytes and dense layers; loading (Linux).

(a) Layers, square or WIDTHxROWS, for one token and for a prompt: ours with three and with four bits, bitsandbytes'
    Linear4bit (NF4) on its unpacked path, on its packed path if the processor has AVX512-BF16, and torch's dense Linear
    in the dtype of the input. The copies of each kind together are several times larger than the processor's cache,
    and run in turns; kinds run in turns within a round, and ratios are medians over rounds.
(b) Loading a Llama with random weights, in separate processes: dense, quantized during loading, and quantized before.
    Peak memory is in addition to the memory of the process before loading, without mapped files.

    python examples/benchmarks/quantization.py --output quantization.json
    python examples/benchmarks/quantization.py --parts latency --widths 4096 --tokens 1 --rounds 3    # a part of it
    python examples/benchmarks/quantization.py --parts latency --widths 4096 4096x11008 --tokens 1 4 16 17 512
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit as StockLinear4bit
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_cod import OwlBnbConfig
from hf_cod.compression.quantization.rounding import fill, new_module, round_matrix
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.io.files import write_json

# Bytes of the copies of one kind together: several times the last-level cache of most processors.
BEYOND_CACHE = 256 * 2**20
OURS, THEIRS, PACKED, DENSE = "3 bits", "bitsandbytes NF4", "bitsandbytes NF4, packed", "dense"
KINDS = (OURS, "4 bits", THEIRS, PACKED, DENSE)
LOADS = ("dense", "quantized while loading", "quantized before")


def our_layer(linear: nn.Linear, bits: int) -> nn.Module:
    """A quantized layer as made by OwlBnbConfig."""
    storage = StorageSettings()
    module = new_module(linear, bits, storage)
    fill(module, round_matrix(linear.weight.detach(), bits, storage, "linear"))
    return module.eval()


def stock_layer(linear: nn.Linear, packed: bool) -> nn.Module:
    """bitsandbytes' own layer. In evaluation mode it packs itself at the first product, if allowed."""
    made = StockLinear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    made.weight = Params4bit(
        linear.weight.detach().float(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    made = made.to("cpu").eval()
    made.support_avx512bf16_for_cpu = packed
    return made


def shape(text: str) -> tuple[int, int]:
    """(width of the input, rows) of "4096" or "4096x11008"."""
    width, _, rows = text.partition("x")
    return int(width), int(rows or width)


def layers_of(size: tuple[int, int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Kind -> one layer, all with the same weights."""
    linear = nn.Linear(*size, bias=False, dtype=dtype).eval()
    found = {
        OURS: our_layer(linear, 3),
        "4 bits": our_layer(linear, 4),
        THEIRS: stock_layer(linear, False),
        DENSE: linear,
    }
    if dtype == torch.bfloat16 and has_avx512bf16():
        found[PACKED] = stock_layer(linear, True)
    return found


def copies_of(module: nn.Module, weights: int) -> list[nn.Module]:
    """Copies that are several times larger than the cache, at three bits per weight, or at the size of dense ones."""
    size = module.weight.nbytes if type(module) is nn.Linear else weights * 3 // 8
    return [copy.deepcopy(module) for _ in range(max(2, -(-BEYOND_CACHE // size)))]


def turns(modules: list[nn.Module], x: torch.Tensor) -> Callable[[], float]:
    """Mean seconds of one module, over all modules in turn."""

    def run() -> float:
        start = time.perf_counter()
        for module in modules:
            module(x)
        return (time.perf_counter() - start) / len(modules)

    return run


@torch.no_grad()
def measure_latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each width, dtype and number of tokens."""
    rows = []
    for size in args.widths:
        width, height = size
        for name in args.dtypes:
            dtype = getattr(torch, name)
            copies = {kind: copies_of(layer, width * height) for kind, layer in layers_of(size, dtype).items()}
            for tokens in args.tokens:
                x = torch.randn(tokens, width, dtype=dtype)
                # A prompt takes so long that caching of weights does not matter.
                runs = {kind: turns(many if tokens <= 16 else many[:2], x) for kind, many in copies.items()}
                for kind, run in runs.items():
                    copies[kind][0](x)  # builds, packs
                    run()  # warms up
                rounds = [{kind: run() for kind, run in runs.items()} for _ in range(args.rounds)]
                rows.append({"width": width, "rows": height, "dtype": name, "tokens": tokens, **summary(rounds)})
                print(line(rows[-1]), flush=True)
    return rows


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds: of seconds, and of the ratio of our three bits to each other kind."""
    kinds = list(rounds[0])
    return {
        "seconds": {kind: statistics.median(found[kind] for found in rounds) for kind in kinds},
        "3 bits / other": {
            kind: statistics.median(found[OURS] / found[kind] for found in rounds) for kind in kinds if kind != OURS
        },
    }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    times = "".join(f"{1000 * row['seconds'].get(kind, float('nan')):>11.2f}" for kind in KINDS)
    shares = "".join(f"{row['3 bits / other'].get(kind, float('nan')):>9.2f}" for kind in KINDS[1:])
    return f"{row['width']:>5} x {row['rows']:<7}{row['dtype']:<10}{row['tokens']:>6}{times}{shares}"


def build_checkpoint(args: argparse.Namespace, folder: Path) -> None:
    """A dense checkpoint of random weights, and the same one quantized."""
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_attention_heads=args.width // 64,
        num_hidden_layers=args.layers,
        vocab_size=2048,
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder / LOADS[0])
    load(folder, LOADS[1]).save_pretrained(folder / LOADS[2])


def load(folder: Path, kind: str) -> Any:
    """Loads the model by one of the compared methods."""
    if kind == LOADS[1]:
        return AutoModelForCausalLM.from_pretrained(folder / LOADS[0], quantization_config=OwlBnbConfig(bits=3.5))
    return AutoModelForCausalLM.from_pretrained(folder / kind)


def anonymous() -> int:
    """Anonymous (not file-backed) memory of this process in KiB."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


class Peak:
    """Maximum of `anonymous` during the block, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def print_load(folder: Path, kind: str, small: Path) -> None:
    """Seconds; additional bytes at the peak, bytes of the model's tensors, and bytes of one layer in fp32."""
    load(small, kind)  # warm-up: imports and initialisation
    start = time.perf_counter()
    with Peak() as peak:
        model = load(folder, kind)
        seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    layer = model.model.layers[0]
    weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
    print(seconds, 1024 * (peak.most - peak.before), size, 4 * weights)


def measure_loading(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method of loading."""
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        folder, small = Path(parent) / "model", Path(parent) / "small"
        build_checkpoint(args, folder)
        build_checkpoint(argparse.Namespace(width=128, layers=2), small)
        for kind in LOADS:
            found = [load_apart(folder, kind, small) for _ in range(args.rounds)]
            seconds, peak, size, layer = (statistics.median(values) for values in zip(*found, strict=True))
            share = peak / (size + layer)
            rows.append({"load": kind, "seconds": seconds, "peak": peak, "size": size, "layer": layer, "share": share})
            sizes = "".join(f"{value / 2**20:>12.1f}" for value in (peak, size, layer))
            print(f"{kind:<26}{seconds:>10.2f}{sizes}{share:>10.3f}", flush=True)
    return rows


def load_apart(folder: Path, kind: str, small: Path) -> list[float]:
    """`print_load` in a process of its own."""
    command = [sys.executable, __file__, "--load", str(folder), kind, str(small)]
    # glibc returns freed memory at once, so that the peak counts memory in use.
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **prompt})
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["latency", "loading"], default=["latency", "loading"])
    parser.add_argument(
        "--widths",
        type=shape,
        nargs="+",
        default=[(1024, 1024), (2048, 2048), (4096, 4096)],
        metavar="WIDTH[xROWS]",
        help="sizes of the layers",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="tokens per product")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the loaded model")
    parser.add_argument("--layers", type=int, default=12, help="layers of the loaded model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)  # for load_apart
    args = parser.parse_args()
    if args.load:
        folder, kind, small = args.load
        print_load(Path(folder), kind, Path(small))
        return
    results: dict[str, Any] = {}
    if "latency" in args.parts:
        if not has_avx512bf16():
            print("bitsandbytes' packed path is left out: it requires AVX512-BF16, which this processor does not have")
        print(f"milliseconds of {', '.join(KINDS)}; then 3 bits' time / the others'")
        results["latency"] = measure_latency(args)
    if "loading" in args.parts:
        print(
            f"{'load':<26}{'seconds':>10}{'peak MiB':>12}{'size MiB':>12}{'layer MiB':>12}{'peak / (size + layer)':>24}"
        )
        results["loading"] = measure_loading(args)
    if args.output:
        settings = {**vars(args), "output": str(args.output), "torch": torch.__version__}
        write_json(args.output, {"settings": settings, "threads": torch.get_num_threads(), **results})


if __name__ == "__main__":
    main()
