"""What `architecture_checks.py` compares results with: naive measurements, zeroed matrices, counts, a reload."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from architecture_inputs import IDS, batches_for, inputs, labels
from architecture_reload import reloaded_outputs
from tiny_architectures import Case
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.pytorch_utils import Conv1D

from hf_cod import find_decoder_layers
from hf_cod.layers.running import evaluation_mode, hidden_input

# Two programs of one sum: experts and attention choose theirs by the shapes in a batch.
ROUNDING = 1e-5


class WrongResult(Exception):
    """A result that differs from the reference, without an error or a note."""


def require(condition: bool, otherwise: str) -> None:
    """Raises WrongResult if `condition` is false."""
    if not condition:
        raise WrongResult(otherwise)


def same(got: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Requires that the largest difference is within this share of the largest expected value."""
    require(got.shape == expected.shape, f"{what} has {tuple(got.shape)} values instead of {tuple(expected.shape)}")
    difference = distance(got, expected)
    require(difference <= tolerance, f"{what} differs by {difference:.1e}")


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    if not expected.numel():
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def outputs_of(case: Case, model: Any) -> Tensor:
    """The outputs of a model on its first batch."""
    return outputs(model, batches_for(case, model)[0])


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What a model outputs, as one vector: logits, the embeddings of two towers, or the last hidden state."""
    return main_output(model(**batch))


def main_output(found: Any) -> Tensor:
    """The same of the output of forward."""
    for names in (["logits"], ["text_embeds", "image_embeds"], ["last_hidden_state"]):
        tensors = [found.get(name) for name in names]
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            return torch.cat([tensor.flatten().float() for tensor in tensors])
    return next(t for t in found.values() if isinstance(t, Tensor) and t.is_floating_point()).flatten().float()


def check_reload(case: Case, model: Any) -> None:
    """Requires that a new process that loads the saved model gets the same outputs."""
    batch = batches_for(case, model)[0]
    same(reloaded_outputs(model, case.auto_class, batch, outputs), outputs(model, batch), "reload", ROUNDING)


def loss_of(case: Case, model: Any, base: Any) -> Tensor:
    """The loss of the first batch; a random combination of the outputs where a model has none.

    Args:
        case: the model's kind.
        model: the model, or a PEFT model around it.
        base: the model itself.
    """
    batch = batches_for(case, base)[0]
    found = model(**batch, **labels(case, base, batch))
    if isinstance(found.get("loss"), Tensor):
        return found.loss
    values = main_output(found)
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(3))).mean()


def naive_angles(case: Case, model: Any) -> list[float | None]:
    """Mean angle between input and output of each layer at the last token, in units of pi; None for one that did not
    run."""
    stack = find_decoder_layers(model, case.stack)
    angles: list[list[Tensor]] = [[] for _ in stack]
    samples = 0

    def hook(index: int) -> Any:
        def measure(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, (tuple, list)) else out
            if x.dim() == 4 and x.shape[2] == IDS.shape[1]:  # streams first, as of Gemma 3n
                x, y = x.movedim(0, 2), y.movedim(0, 2)
            if x.dim() == 3 and len(x) != samples == x.shape[1]:  # tokens first, as of XLNet
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            cosine = F.cosine_similarity(x.double().flatten(2)[:, -1], y.double().flatten(2)[:, -1], dim=-1)
            angles[index].append(torch.arccos(cosine.clamp(-1, 1)) / torch.pi)

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for batch in batches_for(case, model):
            samples = len(next(iter(batch.values())))
            with torch.no_grad(), evaluation_mode(stack):  # without a cache, with which FSMT reads later tokens, too
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(found).mean()) if found else None for found in angles]


def generates_alike(case: Case, model: Any) -> str | None:
    """Requires the same generation with a cache as without, if the intact model has that."""
    if not isinstance(model, GenerationMixin) or not model.can_generate():
        return None
    if not _generates(case):
        return "the intact model generates otherwise with a cache, or not at all"
    difference = distance(_generated(case, model, True), _generated(case, model, False))
    require(difference <= ROUNDING, f"generation with a cache differs by {difference:.1e}")
    return None


@cache
def _generates(case: Case) -> bool:
    """Whether the intact model generates the same with a cache as without."""
    try:
        for seed in (0, 1, 2):  # a choice of the best tokens or experts is equal for some weights only
            intact = case.build(seed)
            if distance(_generated(case, intact, True), _generated(case, intact, False)) > ROUNDING:
                return False
    except Exception:  # whatever transformers raises where a model requires more than the inputs of forward
        return False
    return True


@torch.no_grad()
def _generated(case: Case, model: Any, use_cache: bool) -> Tensor:
    """The logits of each generated token."""
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    told = {"output_logits": True, "return_dict_in_generate": True}
    given = inputs(case, model, IDS[:1])
    return torch.stack(model.generate(**given, use_cache=use_cache, **settings, **told).logits)


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


@contextmanager
def passing_on(stack: Any, index: int) -> Iterator[list[int]]:
    """Within the block a layer runs, but hands on its input; what else layers return is that of the layer before. Adds
    to the list for each call; a model that calls the `forward` of its layers (SqueezeBERT) has no hooks.
    """
    calls: list[int] = []
    before: list[Any] = []

    def return_input(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        calls.append(index)
        hidden = hidden_input(args, kwargs)
        if not isinstance(output, (tuple, list)):
            return hidden
        # Another state of the first layer, such as Pegasus-X's global tokens, is an input of it as well.
        given = [args[i] if i < len(args) and _alike(args[i], own) else own for i, own in enumerate(output)]
        handed = [hidden, *(before[-1] if before else given)[1:]]
        return (
            output._replace(**dict(zip(output._fields, handed, strict=True)))
            if hasattr(output, "_fields")
            else type(output)(handed)
        )

    handles = [stack[index].register_forward_hook(return_input, with_kwargs=True)]
    if index:
        handles.append(stack[index - 1].register_forward_hook(lambda module, args, output: before.append(output)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def check_counted(stack: Any, counted: int) -> str | None:
    """Requires that each matrix of a Linear of the layers is among the `counted` weights; says what else there is."""
    whole = sum(p.numel() for p in {p for layer in stack for p in layer.parameters()} if p.dim() > 1)
    others, left, banks = set(), 0, False
    for module in {module for layer in stack for module in layer.modules()}:
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        bank = any(p.dim() == 3 for p in own) and any("expert" in name for name in vars(module))
        banks |= bank
        if own and not (hasattr(module, "in_features") or isinstance(module, Conv1D) or bank):
            others.add(type(module).__name__)
            left += sum(p.numel() for p in own)
    if counted == whole:
        return None
    require(counted + left == whole or banks, f"{counted:,} weights counted and {left:,} others of {whole:,}")
    return f"{whole - counted:,} of {whole:,} weights of the layers are in no matrix: {', '.join(sorted(others))}"


def told_weights(notes: list[str], sizes: dict[str, int]) -> int:
    """The number of weights that notes of a report exclude.

    Args:
        notes: those of `quantize`.
        sizes: name -> number of weights, of each matrix and each bank of experts.
    """
    told = 0
    for note in notes:
        if found := re.search(r"of ([\d,]+) weights not quantized", note):
            told += int(found[1].replace(",", ""))
        elif " is not quantized: " in note:
            name = note.partition(" is not quantized: ")[0]
            told += sum(size for matrix, size in sizes.items() if matrix == name or matrix.startswith(f"{name}."))
    return told


@torch.no_grad()
def cut_to_ranks(model: Any, ranks: dict[str, int]) -> None:
    """Replaces these matrices by those of a lower rank that are nearest to them."""
    for name, rank in ranks.items():
        weight = model.get_submodule(name).weight
        U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
        weight.copy_(U[:, :rank] * S[:rank] @ V[:rank])


@torch.no_grad()
def zeroed_as(narrower: Any, intact: Any) -> Any:
    """The intact model with zeros for the rows and columns of its matrices that the narrower one lacks."""
    smaller = dict(narrower.named_parameters())
    for name, weight in intact.named_parameters():
        left = smaller[name]
        if weight.dim() != 2 or left.shape == weight.shape:
            continue
        cut = 0 if left.shape[0] != weight.shape[0] else 1
        here, there = weight.movedim(cut, 0), left.movedim(cut, 0)
        rows = {row.numpy().tobytes() for row in there}
        kept = torch.tensor([row.numpy().tobytes() in rows for row in here])
        require(int(kept.sum()) == len(there), f"{name} has other rows than the intact matrix")
        here[~kept] = 0
        module = intact.get_submodule(name.rpartition(".")[0])
        if module.bias is not None and cut == int(isinstance(module, Conv1D)):
            module.bias[~kept] = 0
    return intact
