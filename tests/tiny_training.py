"""Tiny trainings for the tests of what watches a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.fresh_processes import FreshProcess, run_fresh

PROBE = [{"input_ids": torch.arange(3, 99).reshape(6, 16)}]


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Random token rows with labels."""
    ids = torch.randint(3, 99, (count, 16), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def silenced(model, index: int):
    """The model with one layer that adds nothing, for good."""
    layer = model.model.layers[index]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.data.zero_()
        linear.requires_grad_(False)
    return model


def layer_norms(model) -> list[float]:
    """Norm of each layer's gradients, as one would write it down."""
    norms = []
    for layer in model.model.layers:
        squares = [float(p.grad.double().square().sum()) for p in layer.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))
    return norms


def train_by_hand(model, steps, learning_rate: float, max_norm: float | None) -> list[list[float]]:
    """SGD with clipping over `steps` (each a list of batches); returns each layer's gradient norm before clipping."""
    found = []
    for batches in steps:
        ids = torch.cat([batch["input_ids"] for batch in batches])
        logits = model(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append(layer_norms(model))
        total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        factor = 1.0 if max_norm is None else min(1.0, max_norm / total)
        with torch.no_grad():
            for p in model.parameters():
                p -= learning_rate * factor * p.grad
                p.grad = None
    return found


def run_in_two_processes(what: str, folder: Path, statuses: Sequence[int] = (0, 0)) -> None:
    """Runs a function of tests/distributed_training.py in two processes, as torchrun starts them."""
    code = "from tests.distributed_training import run; run()"
    # Accelerate asks for an address; the two find each other by a file.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    both = [
        FreshProcess(code, what, folder, environment={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    done = [process.wait() for process in both]
    ended = [process.returncode for process in done]
    assert ended == [*statuses], "".join(process.stderr[-3000:] for process in done)


DIES = """
import os, sys
from hf_cod.training.owlore.optimizer import OwLoreAdamW
step = OwLoreAdamW.step
def dies(self, *args, **kwargs):
    step(self, *args, **kwargs)
    if self.steps == 5: os._exit(9)
OwLoreAdamW.step = dies
from hf_cod.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def dies_in_step_five(command):
    """Runs a command of hf-cod that trains by OwLoreAdamW, in a process that is gone behind its fifth step."""
    done = run_fresh(DIES, *command, environment={"TRANSFORMERS_VERBOSITY": "error"})
    assert done.returncode == 9, done.stderr[-2000:]
