"""Peak memory, time and results of commands with and without `--max-memory`, on a random model of Llama's shape.

    python examples/benchmarks/out_of_core.py --layers 24 --width 1024 --output out-of-core.json

The model is written layer by layer, one file each, so that its size is limited by the disk alone. Each command runs in
a fresh process, whose peak is `ru_maxrss`; "baseline" is that of a process that imports the same modules and loads the
tokenizer. "equal" says whether the safetensors files of both ways are the same byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from hf_cod.io.files import write_json
from hf_cod.io.models import EMBEDDED
from hf_cod.io.report import RunReport

COMMANDS = {
    "wanda": ["prune", "--method", "wanda", "--score", "uniform"],
    "owl": ["prune", "--method", "wanda", "--score", "owl", "--no-baseline"],
    "sparsegpt": ["prune", "--method", "sparsegpt", "--score", "uniform"],
    "magnitude": ["prune", "--method", "magnitude", "--score", "uniform"],
    "nearest": ["quantize", "--bits", "3.5", "--score", "uniform", "--no-baseline", "--rounding", "nearest"],
    "compensated": ["quantize", "--bits", "3.5", "--score", "uniform", "--no-baseline", "--rounding", "compensated"],
}


def write_model(directory: Path, arguments: argparse.Namespace) -> int:
    """Writes a random bf16 model layer by layer, with the embedded tokenizer; returns the bytes of its weights."""
    AutoTokenizer.from_pretrained(EMBEDDED / "pre").save_pretrained(directory)
    heads = arguments.width // arguments.head
    config = CONFIG_MAPPING["llama"](
        hidden_size=arguments.width,
        intermediate_size=arguments.channels or 3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=arguments.vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for key in shapes:
        parts.setdefault(".".join(key.split(".")[:3]) if ".layers." in key else key, []).append(key)
    weight_map, numbers = {}, _RandomNumbers(max(shape.numel() for shape in shapes.values()))
    for number, keys in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {key: numbers.of(shapes[key]) for key in keys}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return size


class _RandomNumbers:
    """Random matrices that are parts of one long vector, each from another place: billions of numbers take minutes."""

    def __init__(self, most: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._numbers = torch.randn(most + (1 << 20), generator=self._generator, dtype=torch.bfloat16)

    def of(self, shape: torch.Size) -> torch.Tensor:
        """A matrix of normal numbers with the variance 1 / columns; a vector of ones."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        start = int(torch.randint(1 << 20, (), generator=self._generator))
        return self._numbers[start : start + shape.numel()].view(shape) * shape[-1] ** -0.5


def run_child(words: list[str]) -> None:
    """Runs a command in this process (none: only imports and the tokenizer); the last line has peak and seconds."""
    started = time.perf_counter()
    from hf_cod.cli.main import main as run
    from hf_cod.compression.pruning import pruner
    from hf_cod.compression.quantization import bnb, quantize

    assert pruner and bnb and quantize
    if words[0] == "baseline":
        AutoTokenizer.from_pretrained(words[1])
    elif run(words) != 0:
        raise SystemExit("the command failed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "seconds": round(time.perf_counter() - started, 1)}))


def measured(words: list[str]) -> dict[str, Any]:
    """What `run_child` prints, of a fresh process."""
    # A small process starts it: a child inherits the peak of the process that forks it.
    starting = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    child = [sys.executable, "-c", starting, sys.executable, __file__, "--child", *words]
    done = subprocess.run(child, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def digests(directory: Path) -> dict[str, str]:
    """File -> SHA-256 of each file of weights."""
    found = {}
    for path in sorted(directory.rglob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def compare(command: str, source: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways of a command, each in a fresh process."""
    found: dict[str, Any] = {}
    written = []
    for way in ["files"] if arguments.only_files else ["memory", "files"]:
        output = folder / f"{command}-{way}"
        limit = ["--max-memory", arguments.limit] if way == "files" else []
        name, *words = COMMANDS[command]
        words += ["--sequence-length", str(arguments.tokens), "--max-samples", str(arguments.samples)]
        words += ["--eval-samples", "4", "--batch-size", "4", "--no-plots", "--device", "cpu"]
        words += ["--output", str(output), *limit]
        found[way] = measured([name, str(source), *words])
        found[way] |= RunReport.load(output).results.get("memory_limit", {})
        print(command, way, json.dumps(found[way]), flush=True)
        written.append(digests(output))
        shutil.rmtree(output)
    return found if arguments.only_files else {**found, "equal": written[0] == written[1] and bool(written[0])}


def main() -> None:
    """Prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--channels", type=int, help="default: 3 x width")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--samples", type=int, default=8, help="for calibration")
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--only-files", action="store_true", help="do not run the commands without --max-memory")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=["wanda", "nearest"])
    parser.add_argument("--output", default="out-of-core.json")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=Path(arguments.output).resolve().parent) as name:
        source = Path(name) / "intact"
        results: dict[str, Any] = {"model_bytes": write_model(source, arguments), "limit": arguments.limit}
        results["baseline"] = measured(["baseline", str(source)])
        for command in arguments.commands:
            results[command] = compare(command, source, Path(name), arguments)
    write_json(arguments.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
