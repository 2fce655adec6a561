"""Low-rank training of banks of experts: a basis for each expert against one basis of the flattened bank.

    python examples/benchmarks/bank_bases.py --output bank-bases.json

A small Mixtral is trained on the bytes of the embedded text; from there, OwLoreAdamW trains all layers with either kind
of basis, at several learning rates. The losses are of the same text, at places drawn with other seeds; the best rate is
chosen on them, for both kinds alike.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hf_cod.training.owlore.optimizer as own
from hf_cod import OwLoreAdamW
from hf_cod.io.files import write_json
from hf_cod.io.text import embedded_text

LENGTH, SAMPLES, HELD_OUT = 64, 8, 12
RATES = (1e-3, 3e-3, 1e-2)


class Flattened(OwLoreAdamW):
    """One basis for a bank (E, N, K), as for a matrix (E N, K)."""

    def _update(self, p: Any, group: dict[str, Any]) -> None:
        if p.ndim != 3 or group["layer"] is None:
            super()._update(p, group)
            return
        W, state = p.data.view(-1, p.shape[-1]), self.state[p]
        G, rank, seed = p.grad.reshape(W.shape), self.settings.rank, self.settings.seed
        generator = own.generator_of(seed, self.draw, self._numbers[p], own._BASIS)
        own.refresh_basis(state, G, rank, self.draw, generator)
        direction = own.adam_direction(state, G, group["betas"], group["eps"], False)
        own.apply_direction(W, direction, state["basis"], group, None)


KINDS: dict[str, type[OwLoreAdamW]] = {"expert": OwLoreAdamW, "flattened": Flattened}


def batch(data: Tensor, seed: int) -> Tensor:
    """Samples (B, T) at random places."""
    places = torch.randint(0, len(data) - LENGTH, (SAMPLES,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[place : place + LENGTH] for place in places.tolist()])


def new_model(width: int) -> Any:
    """A random mixture whose experts have `width` channels."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": width, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**sizes, **heads, **experts))


def train(model: Any, optimizer: torch.optim.Optimizer, data: Tensor, seeds: range) -> None:
    """One step for each seed."""
    for seed in seeds:
        ids = batch(data, seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_of(model: Any, data: Tensor) -> float:
    """Mean loss in nats."""
    found = [model(input_ids=ids, labels=ids).loss for ids in (batch(data, 10_000 + i) for i in range(HELD_OUT))]
    return float(torch.stack(found).mean())


def measure(start: Any, kind: str, rank: int, steps: int, data: Tensor) -> dict[str, Any]:
    """The lowest loss over the rates, and the bytes of the optimizer's state of the banks."""
    found = []
    for rate in RATES:
        model = copy.deepcopy(start)
        optimizer = KINDS[kind](model, lr=rate, n_active=3, interval=50, rank=rank)
        train(model, optimizer, data, range(1000, 1000 + steps))
        banks = [state for p, state in optimizer.state.items() if p.ndim == 3]
        found.append((loss_of(model, data), rate, sum(t.nbytes for state in banks for t in state.values())))
    loss, rate, size = min(found)
    return {"basis": kind, "rank": rank, "loss": loss, "learning_rate": rate, "state_bytes": size}


def main() -> None:
    """Prints a row for each width, rank and kind of basis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 128], help="widths of an expert")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16], help="ranks of the bases")
    parser.add_argument("--warm-up", type=int, default=150, help="steps of AdamW before")
    parser.add_argument("--steps", type=int, default=60, help="steps that are compared")
    parser.add_argument("--output", help="JSON file for the figures")
    arguments = parser.parse_args()
    data, rows = torch.tensor(list(embedded_text().encode())), []
    for width in arguments.widths:
        start = new_model(width)
        train(start, torch.optim.AdamW(start.parameters(), lr=2e-3), data, range(arguments.warm_up))
        before = loss_of(start, data)
        for rank in arguments.ranks:
            for kind in KINDS:
                row = {"width": width, "start": before, **measure(start, kind, rank, arguments.steps, data)}
                rows.append(row)
                print(
                    f"width {width}, rank {rank}, {kind}: loss {row['loss']:.4f} (start {before:.4f}), "
                    f"{row['state_bytes']:,} bytes",
                    flush=True,
                )
    if arguments.output:
        write_json(arguments.output, {"settings": vars(arguments), "rows": rows})


if __name__ == "__main__":
    main()
