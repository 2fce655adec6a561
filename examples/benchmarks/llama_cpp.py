"""Plans of hf_cod against llama.cpp's own mixtures at equal size, quantized and measured by llama.cpp itself.

Each mixture is made with the importance matrix of the calibration text. A plan then gets the stored bits per weight
that the layers of the mixture have, the same importance matrix, and q8_0 for the embedding and the head. "uniform" is
one type for all matrices. What --embedding-bits below 8 leave goes to the layers, so that files have one size.
Perplexity is that of llama.cpp's logits.

    python examples/benchmarks/llama_cpp.py --model DIRECTORY --gguf MODEL.gguf --text TEXT --output llama_cpp.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import libllama
import numpy as np

from hf_cod import collect_statistics, find_decoder_layers, score_layers, token_batches
from hf_cod.analysis.statistics.imatrix import read_imatrix
from hf_cod.compression.export.exporter import export
from hf_cod.compression.export.llama_cpp import BASE, BASE_TYPE, BLOCKS, IMATRIX, TYPES, other_type
from hf_cod.io.files import write_json
from hf_cod.io.models import ModelSettings, load_model

LENGTH = 256


def sizes(file: Path) -> tuple[int, float]:
    """(bytes of all tensors, stored bits per weight of the layers' matrices) of a GGUF."""
    tensors = gguf.GGUFReader(file).tensors
    matrices = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    return sum(int(t.n_bytes) for t in tensors), bits


def freed(file: Path, kind: str) -> float:
    """Bits per weight of the layers' matrices that another type of the embedding and the head leaves."""
    found = [t for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1]
    inside = sum(int(t.n_elements) for t in found if t.name.startswith("blk."))
    outside = sum(int(t.n_elements) for t in found) - inside
    bits = {name: 8 * BLOCKS[name][1] / BLOCKS[name][0] for name in (BASE_TYPE, kind)}
    return (bits[BASE_TYPE] - bits[kind]) * outside / inside


def perplexity(file: Path, samples: np.ndarray) -> float:
    """Perplexity of llama.cpp on samples (n, LENGTH) of tokens."""
    llama = libllama.Llama(file, samples.shape[1])
    losses = []
    for ids in samples:
        logits = llama.logits(ids.tolist())[:-1].astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[1:, None], -1)
        losses.append(float((np.log(np.exp(logits - largest).sum(-1, keepdims=True)) + largest - chosen).mean()))
    llama.close()
    return float(np.exp(np.mean(losses)))


def means_of(file: Path) -> dict[str, np.ndarray]:
    """The importance matrix as llama.cpp quantizes with it: mean squares of the inputs."""
    found = read_imatrix(file)
    return {name: (sums / counts.clamp(1)[:, None]).float().numpy().ravel() for name, (sums, counts) in found.items()}


class Bench:
    """One model, and what is measured of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Makes a GGUF in 16 bits and an importance matrix."""
        self.folder, self.args = folder, args
        self.model, tokenizer = load_model(args.model, ModelSettings(dtype="float32"))
        half = len(text := args.text.read_text(encoding="utf-8")) // 2
        cut: dict[str, Any] = {"sequence_length": LENGTH, "max_samples": args.calibration}
        self.batches = token_batches(tokenizer, text[:half], **cut)
        held_out = tokenizer(text[half:], return_tensors="np")["input_ids"][0]
        self.samples = held_out[: args.samples * LENGTH].reshape(args.samples, LENGTH)
        self.statistics = collect_statistics(self.model, self.batches)
        self.imatrix = means_of(self.statistics.save(folder / IMATRIX, model=self.model))
        self.source = libllama.quantize(args.gguf, folder / "f16.gguf", "F16", requantize=True)

    def made(self, file_type: str, **how: Any) -> Path:
        """The model quantized by llama.cpp."""
        return libllama.quantize(self.source, self.folder / "made.gguf", file_type, imatrix=self.imatrix, **how)

    def by_plan(self, mixture: Path, score: str, granularity: str, embedding: int) -> tuple[Path, int]:
        """(the model quantized by a plan of the size of a mixture, its planned size); what an embedding of less than
        eight bits leaves goes to the layers.
        """
        others = other_type(find_decoder_layers(self.model), embedding)
        bits = sizes(mixture)[1] + freed(mixture, others)
        how: dict[str, Any] = {"search": True, "passes": self.args.passes, "batches": self.batches}
        if score != "search":
            options = {} if granularity == "layer" else {"granularity": granularity}
            how = {"scores": score_layers(self.model, self.statistics, score, batches=self.batches, **options)}
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            output = Path(name)
            how["statistics"] = self.statistics
            report = export(self.model, output, to="llama.cpp", bits=bits, embedding_bits=embedding, **how)
            types = libllama.types_of(output / TYPES)
        said = next(line for line in report.summary if "will have " in line)
        planned = int(said.split("will have ")[1].split(" ")[0].replace(",", ""))
        return self.made(BASE, types=types, others=others), planned

    def row(self, name: str, file: Path, planned: int | None = None) -> dict[str, Any]:
        """The figures of a file."""
        size, bits = sizes(file)
        found = {"plan": name, "bytes": size, "planned": planned, "bits": bits}
        found["perplexity"] = perplexity(file, self.samples)
        print(f"{name:<28}{size / 1e6:>9.2f}{bits:>8.3f}{found['perplexity']:>12.2f}", flush=True)
        return found


def rows(bench: Bench, mixtures: Sequence[str], uniform: Sequence[str], scores: Sequence[str]) -> Iterator[Any]:
    """The rows of the table."""
    yield bench.row("F16", bench.source)
    for kind in uniform:
        yield bench.row(f"uniform {kind}", bench.made(kind, pure=True, others=BASE_TYPE))
    for kind in mixtures:
        file = bench.made(kind, others=BASE_TYPE)
        yield bench.row(f"llama.cpp {kind}", file)
        file = file.replace(file.with_name("mixture.gguf"))
        for name, embedding in product(scores, bench.args.embedding_bits):
            score, _, granularity = name.partition(":")
            made, planned = bench.by_plan(file, score, granularity or "layer", embedding)
            yield bench.row(f"  {name}, embedding {embedding}", made, planned)


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of the model")
    parser.add_argument("--gguf", type=Path, required=True, help="the same model as a GGUF")
    parser.add_argument("--text", type=Path, required=True, help="a file of text: the first half calibrates")
    parser.add_argument("--mixtures", nargs="+", default=["Q3_K_M", "Q4_K_M"], help="file types of llama.cpp")
    parser.add_argument("--uniform", nargs="*", default=["IQ4_NL", "Q5_0"], help="file types, without a mixture")
    parser.add_argument(
        "--scores", nargs="+", default=["owl", "fisher:module"], help="METHOD, METHOD:GRANULARITY, or search"
    )
    parser.add_argument("--embedding-bits", nargs="+", type=int, default=[8], help="widths of the embedding and head")
    parser.add_argument("--passes", type=int, default=1000, help="forward passes of the search, each of one sample")
    parser.add_argument("--calibration", type=int, default=32, help=f"samples of {LENGTH} tokens")
    parser.add_argument("--samples", type=int, default=12, help=f"held-out samples of {LENGTH} tokens")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    print(f"{'':<28}{'MB':>9}{'bits':>8}{'perplexity':>12}")
    with tempfile.TemporaryDirectory() as name:
        found = list(rows(Bench(args, Path(name)), args.mixtures, args.uniform, args.scores))
    if args.output:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.output, {"settings": settings, "rows": found})


if __name__ == "__main__":
    main()
