"""Speed of models with lower rank, fewer heads and channels, and fewer layers, compared with the dense model.

    python examples/benchmarks/smaller.py                            # a Llama of random weights, 2048 wide
    python examples/benchmarks/smaller.py --model DIRECTORY_OR_HUB_ID

Models run in turns in one process: in each round, each model processes one prompt and then generates. The promised
speed-up of a smaller model is the ratio of weights per token: weights of the layers for a token of the prompt, and also
of the head for a generated token. `of promise` is the measured speed-up divided by the promised one; medians over
rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cod import drop, find_decoder_layers, narrow
from hf_cod.compression.low_rank.rank_plan import plan_of_allocation
from hf_cod.io.files import write_json
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.layers.size import size_of
from hf_cod.layers.speed import measure_speed
from hf_cod.models.shaping import record_shapes
from hf_cod.scoring.allocation import same_share


def smaller(dense: Any, kept: float) -> dict[str, Any]:
    """The model, compressed by each method. The choice of weights does not matter: time depends on shapes only."""
    models = {name: copy.deepcopy(dense) for name in ("rank", "width", "depth")}
    stack = find_decoder_layers(models["rank"])
    plan = plan_of_allocation(stack, same_share(stack, kept))
    record_shapes(models["rank"], {name: {"rank": rank} for name, rank in plan.ranks.items()})
    for name in plan.ranks:  # random factors, because `factorize` would take long to compute them
        for factor in models["rank"].get_submodule(name).parameters():
            torch.nn.init.normal_(factor, std=0.02)
    narrow(models["width"], kept, "magnitude", "none")
    drop(models["depth"], list(range(len(stack)))[round(kept * len(stack)) :])
    return {"dense": dense, **models}


def weights_passed(model: Any) -> tuple[int, int]:
    """Number of weights that are multiplied per token of the prompt, and per generated token."""
    layers = size_of(model).layer_weights
    return layers, layers + model.get_output_embeddings().weight.numel()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model and each part (prompt, generation)."""
    models = smaller(load(args), args.parameter_share)
    prompt = torch.arange(3, 3 + args.prompt)[None]
    stacks = {name: find_decoder_layers(model) for name, model in models.items()}
    speeds = measure_speed(stacks, prompt, args.rounds, args.new_tokens)
    rows = []
    for part, what in enumerate(("prompt", "generation")):
        for name, model in models.items():
            base, own = getattr(speeds["dense"], what), getattr(speeds[name], what)
            promised = weights_passed(models["dense"])[part] / weights_passed(model)[part]
            faster = statistics.median(b / a for a, b in zip(base, own, strict=True))
            rows.append(
                {
                    "part": what,
                    "model": name,
                    "tokens a second": statistics.median(own),
                    "faster": faster,
                    "promised": promised,
                    "of promise": faster / promised,
                }
            )
    return rows


def load(args: argparse.Namespace) -> Any:
    """The dense model."""
    if args.model:
        return load_model(args.model, ModelSettings(dtype=args.dtype))[0].eval()
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_hidden_layers=args.layers,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype)).eval()


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: random weights")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model with random weights")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--parameter-share", type=float, default=0.6, help="share of the layers' weights to keep")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens generated per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    rows = measure(args)
    print("| part | model | tokens a second | faster | promised | of promise |\n|---|---|---:|---:|---:|---:|")
    for row in rows:
        cells = [f"{row['tokens a second']:.1f}", *(f"{row[key]:.2f}" for key in ("faster", "promised", "of promise"))]
        print("|", " | ".join([row["part"], row["model"], *cells]), "|")
    if args.output:
        settings = {key: str(value) for key, value in vars(args).items()}
        write_json(args.output, {"settings": settings, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
