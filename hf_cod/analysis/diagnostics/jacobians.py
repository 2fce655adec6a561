"""How far the Jacobian of each layer is from the identity, by products with random vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.modes import gradients_restored
from hf_cod.layers.running import evaluation_mode, hidden_input, hidden_output, progress, with_hidden
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

# Random vectors for each batch.
N_PROBES = 4


def measure_jacobian(
    model: nn.Module,
    batches: Sequence[Batch],
    journal: Journal | None = None,
    *,
    n_probes: int = N_PROBES,
    seed: int = 0,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> list[float]:
    """Distance of each layer's Jacobian from the identity, relative to the identity.

        ||J_l - I||_F / ||I||_F,    J_l = d x^(l+1) / d x^l over all tokens of a sample, (T d, T d)
        ||J_l - I||_F^2 = E || J_l^T u - u ||^2,    u of independent signs (Hutchinson 1989)

    arXiv 2603.15389 reads near-identity layers from it. The matrix is never computed: each probe is one backward pass
    through the layer alone, so the measure costs a forward pass and `n_probes` backward passes for each batch, with
    the activations of one layer in memory. The mean over batches is of squares. Padding is left out of rows and
    columns. A layer that runs several times counts with the mean over its runs.

    Args:
        model: a transformers model, wrapped or not; it is not changed.
        batches: dicts for the model's forward.
        journal: stores each batch; stored entries are not computed again.
        n_probes: number of vectors u for each batch.
        seed: seed of the vectors.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        One value per layer.

    Raises:
        ValueError: layers through which no gradient flows, which do not run on these inputs, or whose input and output
            have different shapes.
    """
    if n_probes < 1:
        raise ValueError(f"n_probes: expected at least 1, got {n_probes}")
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    journal = Journal(None, "") if journal is None else journal
    device = execution_device(stack.model)
    sound = partial(_check, layers=len(stack))
    parameters = [p for p in stack.model.parameters() if not p.is_inference()]
    with torch.inference_mode(False), gradients_restored(parameters), evaluation_mode(stack), torch.enable_grad():
        for p in parameters:
            p.requires_grad_(False)
        for number, batch in enumerate(progress(batches, "Jacobians", show_progress)):
            if not journal.is_sound(str(number), sound):
                journal.add(str(number), _sums(stack, to_device(batch, device), number, n_probes, seed))
    rows = torch.tensor([journal[str(number)] for number in range(len(batches))], dtype=torch.float64).sum(0)
    return (rows[:, 0] / rows[:, 1]).sqrt().tolist()


def _sums(stack: DecoderLayers, batch: Batch, number: int, n_probes: int, seed: int) -> list[list[float]]:
    """For each layer the estimate of ||J - I||_F^2, and ||I||_F^2, summed over its runs."""
    inputs = model_inputs(stack.model, batch)
    generator = torch.Generator().manual_seed(seed + number)
    with _observed(stack, stack.mask(inputs), n_probes, generator) as sums:
        stack.trunk(**inputs)
    missing = next((layer for layer, (_, count) in enumerate(sums) if not count), None)
    if missing is not None:
        raise ValueError(f"jacobian: expected inputs on which each layer runs, got others for layer {missing}")
    return sums


@contextmanager
def _observed(
    stack: DecoderLayers, mask: Any, n_probes: int, generator: torch.Generator
) -> Iterator[list[list[float]]]:
    """Fills the sums of each layer while the block runs the model. Each layer reads a state without history, so that
    what is kept for a backward pass is that of one layer.
    """
    sums = [[0.0, 0.0] for _ in range(len(stack))]
    leaves: dict[int, Tensor] = {}

    def enter_of(index: int) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            leaves[index] = hidden_input(args, kwargs).detach().requires_grad_()
            # A copy, because a layer may add to its input in place.
            return with_hidden(args, kwargs, leaves[index].clone())

        return enter

    def leave_of(index: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            x, y = leaves.pop(index), hidden_output(output)
            if not y.requires_grad or x.shape != y.shape:
                what = "no gradient" if x.shape == y.shape else f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
                raise ValueError(
                    f"jacobian: expected layers with a gradient from their output to an input of its shape, got {what} "
                    f"in layer {index}"
                )
            for distance, size in _products(x, y, mask, n_probes, generator):
                sums[index][0] += distance
                sums[index][1] += size

        return leave

    with ExitStack() as block:
        for index, layer in enumerate(stack):
            block.callback(layer.register_forward_pre_hook(enter_of(index), with_kwargs=True).remove)
            block.callback(layer.register_forward_hook(leave_of(index)).remove)
        yield sums


def _products(
    x: Tensor, y: Tensor, mask: Any, n_probes: int, generator: torch.Generator
) -> Iterator[tuple[float, float]]:
    """For each probe || J^T u - u ||^2, and the number of entries of u that count."""
    kept = torch.ones_like(x)
    if mask is not None and mask.shape == x.shape[:2]:
        kept = kept * mask.to(x).view(*mask.shape, *[1] * (x.dim() - 2))
    for _ in range(n_probes):
        u = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x) * kept
        (product,) = torch.autograd.grad(y, x, u, retain_graph=True)
        yield float((product * kept - u).float().square().sum()), float(kept.float().sum())


def _check(value: Any, layers: int) -> None:
    check_value(value, list[tuple[float, float]], "jacobian", limits(least=0))
    if len(value) != layers or any(size == 0 for _, size in value):
        raise ValueError(f"jacobian: expected {layers} layers, got {len(value)}")
