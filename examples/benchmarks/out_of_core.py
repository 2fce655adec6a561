"""Memory and time of compression with and without `--max-memory`, on a random model of Llama's shape.

    python examples/benchmarks/out_of_core.py --layers 24 --width 1024 --limit 500MB --output out-of-core.json

Each way runs in a process of its own. Peaks are samples of what the process holds: `anonymous` has no file, so the
system cannot drop it; `resident` adds the mapped pages of files, which it drops when it needs room. The bytes of the
weights that both ways write are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_cod import prune, quantize
from hf_cod.cli.sizes import parse_bytes
from hf_cod.io.file_memory import weights_in_files
from hf_cod.io.files import write_json
from hf_cod.io.models import load_model

FIELDS = {"anonymous": "RssAnon", "resident": "VmRSS"}
METHODS: dict[str, Any] = {
    "magnitude": lambda model, batches, journal: prune(model, 0.5, method="magnitude", journal=journal),
    "wanda": lambda model, batches, journal: prune(model, 0.5, method="wanda", batches=batches, journal=journal),
    "sparsegpt": lambda model, batches, journal: prune(
        model, 0.5, method="sparsegpt", batches=batches, journal=journal
    ),
    "rounded": lambda model, batches, journal: quantize(model, bits=3.5, journal=journal),
    "compensated": lambda model, batches, journal: quantize(model, bits=3.5, batches=batches, journal=journal),
}


class Peaks(threading.Thread):
    """Samples the memory of this process until `ended` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.bytes = threading.Event(), dict.fromkeys(FIELDS, 0)

    def run(self) -> None:
        """Reads every 20 ms."""
        while not self.ended.wait(0.02):
            status = Path("/proc/self/status").read_text()
            for name, field in FIELDS.items():
                found = re.search(rf"{field}:\s+(\d+)", status)
                self.bytes[name] = max(self.bytes[name], 1024 * int(found[1]) if found else 0)


def write_model(directory: Path, layers: int, width: int) -> None:
    """A random model in shards of 200 MB."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 4096}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes, **heads), dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="200MB")


def run_one(source: Path, target: Path, method: str, limit: int | None) -> dict[str, Any]:
    """Compresses in this process; peaks of the work on the layers, and of everything with the saving."""
    started, peaks = time.perf_counter(), Peaks()
    peaks.start()
    target.mkdir()
    batches = [{"input_ids": torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(0))}]
    with nullcontext() if limit is None else weights_in_files(target, limit):
        model = load_model(str(source), device="cpu")[0]
        METHODS[method](model, batches, target / "journal")
        layers = dict(peaks.bytes)
        model.save_pretrained(target / "model", max_shard_size="200MB")
    peaks.ended.set()
    peaks.join()
    return {"layers": layers, "with_saving": peaks.bytes, "seconds": time.perf_counter() - started}


def digest(directory: Path) -> str:
    """SHA-256 of all weights of a model."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def copy_seconds(source: Path, target: Path) -> float:
    """Time to read and write the weights once."""
    started = time.perf_counter()
    target.mkdir()
    for path in source.glob("*.safetensors"):
        (target / path.name).write_bytes(path.read_bytes())
    return time.perf_counter() - started


def compare(method: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both ways of one method, each in a fresh process."""
    found: dict[str, Any] = {}
    digests = []
    for way, limit in (("memory", None), ("files", arguments.limit)):
        target = folder / f"{method}-{way}"
        told = ["--child", str(folder / "intact"), str(target), method, *([limit] if limit else [])]
        done = subprocess.run([sys.executable, __file__, *told], check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        digests.append(digest(target / "model"))
        print(method, way, json.dumps(found[way]), flush=True)
    return {**found, "same_bytes": digests[0] == digests[1]}


def main() -> None:
    """Prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--limit", default="1GB")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", default="out-of-core.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, target, method, *limit = arguments.child
        size = parse_bytes(limit[0], "limit") if limit else None
        print(json.dumps(run_one(Path(source), Path(target), method, size)))
        return
    with tempfile.TemporaryDirectory(dir=Path(arguments.output).resolve().parent) as name:
        folder = Path(name)
        write_model(folder / "intact", arguments.layers, arguments.width)
        size = sum(path.stat().st_size for path in (folder / "intact").glob("*.safetensors"))
        results: dict[str, Any] = {"model_bytes": size, "limit": arguments.limit}
        results["copy_seconds"] = copy_seconds(folder / "intact", folder / "copy")
        for method in arguments.methods:
            results[method] = compare(method, arguments, folder)
    write_json(arguments.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
