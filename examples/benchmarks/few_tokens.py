"""Error compensation with few tokens, as enter an expert: what it loses on other tokens, of SmolLM2-135M's MLPs.

Matrices of a dense model are rounded to three bits as if they were those of an expert that n tokens were routed to:
with compensation by H, the products of these tokens, by H moved towards its diagonal (`functional.damping.shrunk`), and
with weighted scales alone. The loss is the share of the energy of the outputs for tokens that none of them has seen.

    python examples/benchmarks/few_tokens.py --model DIRECTORY_OR_HUB_ID --text TEXT --output few_tokens.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional import codebook
from hf_cod.functional.damping import shrunk
from hf_cod.io.files import write_json
from hf_cod.io.models import ModelSettings, load_model

BITS, BLOCK = 3, 64
SHARES = (1 / 16, 1 / 4, 1, 2)
KEYS = ("up_proj", "down_proj")


def compensated(W: Tensor, H: Tensor) -> Tensor:
    """W rounded with error compensation."""
    s = codebook.search_scales(W, BITS, BLOCK, H.diagonal())
    return codebook.decode(codebook.compensated_codes(W, s, H, BITS, BLOCK), s, BITS, BLOCK)


# Way to round -> (W, H, n) -> W rounded.
WAYS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "H": lambda W, H, n: compensated(W, H),
    "H + (K / n) diag(H)": lambda W, H, n: compensated(W, shrunk(H, n)),
    "weighted scales": lambda W, H, n: codebook.rounded(W, BITS, H.diagonal(), BLOCK),
}


@torch.no_grad()
def inputs_of(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (some rows of the matrix, its inputs in random order) of each chosen matrix."""
    model, tokenizer = load_model(args.model, ModelSettings(dtype="float32"))
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: args.samples * 256]
    found: dict[str, list[Tensor]] = {}
    mlps = {layer: model.model.layers[layer].mlp for layer in args.layers}
    modules = {f"{layer}.{key}": getattr(mlp, key) for layer, mlp in mlps.items() for key in KEYS}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, x, name=name: found.setdefault(name, []).append(x[0].flatten(0, 1)))
    for batch in ids.view(-1, 256).split(4):
        model(batch)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return {name: (modules[name].weight[: args.rows], torch.cat(x)[order]) for name, x in found.items()}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each share of tokens: the mean loss over all matrices."""
    known = inputs_of(args)
    rows = []
    for share in SHARES:
        lost: dict[str, list[float]] = {way: [] for way in WAYS}
        for W, x in known.values():
            n, test = int(share * W.shape[1]), x[-2048:]
            assert n + len(test) <= len(x), "more --samples"
            H, other = x[:n].T @ x[:n], test.T @ test
            for way, rounded in WAYS.items():
                E = W - rounded(W, H, n)
                lost[way].append(float(((E @ other) * E).sum() / ((W @ other) * W).sum()))
        rows.append({"tokens / channels": share, **{way: mean(values) for way, values in lost.items()}})
        print(f"{share:>10.4f}" + "".join(f"{rows[-1][way]:>22.4f}" for way in WAYS), flush=True)
    return rows


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of a Llama")
    parser.add_argument("--text", type=Path, required=True, help="a file of text")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--rows", type=int, default=128, help="rows of each matrix")
    parser.add_argument("--samples", type=int, default=24, help="samples of 256 tokens")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    print(f"{'n / K':>10}" + "".join(f"{way:>22}" for way in WAYS))
    rows = measure(args)
    if args.output:
        settings = {**vars(args), "text": str(args.text), "output": str(args.output)}
        write_json(args.output, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
