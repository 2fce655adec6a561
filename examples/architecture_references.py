"""What `architecture_checks.py` compares results with: naive measurements, zeroed matrices, counts."""

from __future__ import annotations

import copy
import math
import re
from functools import cache
from typing import Any

import torch
from architecture_comparison import ROUNDING, distance, main_output, require
from architecture_inputs import IDS, batches_for, inputs, labels
from tiny_architectures import Case
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.pytorch_utils import Conv1D

from hf_cod import find_decoder_layers
from hf_cod.layers.running import evaluation_mode


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
    """Mean angle between the state before each layer, which is the output of the one before, and its own output at the
    last token, in units of pi, over all of its runs; None for one that did not run."""
    stack = find_decoder_layers(model, case.stack)
    angles: list[list[Tensor]] = [[] for _ in stack]
    before: list[Tensor] = []
    ran: set[int] = set()
    samples = tokens = 0

    def hook(index: int) -> Any:
        def measure(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = out[0] if isinstance(out, (tuple, list)) else out
            if hasattr(out, "attn_output"):  # two streams, as of Reformer
                x = torch.cat([kwargs["prev_attn_output"], x], -1)
                y = torch.cat([out.attn_output, out.hidden_states], -1)
            if index in ran:  # a loop begins again, with an input of its own
                before.clear()
                ran.clear()
            # Not its input, to which the model may have added something after the layer before (YOLOS).
            x = before[-1] if before else x
            before.append(y)
            ran.add(index)
            if x.dim() == 2:  # the patches of all images as one sample, as of Qwen2-VL
                x, y = x[None], y[None]
            if x.dim() == 4 and x.shape[2] == tokens:  # streams first, as of Gemma 3n
                x, y = x.movedim(0, 2), y.movedim(0, 2)
            if x.dim() == 3 and len(x) != samples == x.shape[1]:  # tokens first, as of XLNet
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            cosine = F.cosine_similarity(x.double().flatten(2)[:, -1], y.double().flatten(2)[:, -1], dim=-1)
            angles[index].append(torch.arccos(cosine.clamp(-1, 1)) / torch.pi)

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for batch in batches_for(case, model):
            samples, tokens = len(next(iter(batch.values()))), next(iter(batch.values())).shape[-1]
            with torch.no_grad(), evaluation_mode(stack):  # without a cache, with which FSMT reads later tokens, too
                model(**batch)
            before.clear()
            ran.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(found).mean()) if found else None for found in angles]


def generates_alike(case: Case, model: Any) -> str | None:
    """Requires the same generation with a cache as without, if the intact model has that."""
    if not isinstance(model, GenerationMixin) or not model.can_generate():
        return None
    intact = _cache_difference(case)
    if intact > ROUNDING:
        return "the intact model generates otherwise with a cache, or not at all"
    difference = distance(_generated(case, model, True), _generated(case, model, False))
    if difference > ROUNDING and not case.images:  # layers that run dozens of times (HRM) sum up more rounding
        exact = copy.deepcopy(model).double()
        difference = distance(_generated(case, exact, True), _generated(case, exact, False))
    # Linear attention computes in float32 in any dtype: there the intact model is near the limit, too.
    limit = max(5 * ROUNDING if case.images else ROUNDING, 10 * intact)
    require(difference <= limit, f"generation with a cache differs by {difference:.1e}")
    return None


@cache
def _cache_difference(case: Case) -> float:
    """How much the logits of the intact model, as it generates, differ with a cache; infinite if it cannot."""
    try:
        models = map(case.build, (0, 1, 2))  # a choice of the best tokens or experts is equal for some weights only
        return max(distance(_generated(case, intact, True), _generated(case, intact, False)) for intact in models)
    except Exception:  # whatever transformers raises where a model requires more than the inputs of forward
        return math.inf


@torch.no_grad()
def _generated(case: Case, model: Any, use_cache: bool) -> Tensor:
    """The logits of each generated token."""
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings["suppress_tokens"] = [90, 91, 92]  # those of images, videos and sound, of which there are no more
    told = {"output_logits": True, "return_dict_in_generate": True}
    given = inputs(case, model, IDS[:1])
    return torch.stack(model.generate(**given, use_cache=use_cache, **settings, **told).logits)


def check_counted(stack: Any, counted: int, notes: list[str], done: str) -> str | None:
    """Requires that the `counted` weights and those that notes of a report exclude are all of the layers, experts
    included in either; vectors and biases are in neither. Returns the notes that exclude some.

    Args:
        stack: the layers.
        counted: the number of weights that the report counts as done.
        notes: of the report.
        done: what the notes say is not done, such as "pruned".
    """
    own = {id(p): (name, p) for layer in stack for name, p in layer.named_parameters()}
    whole = sum(p.numel() for name, p in own.values() if p.dim() > 1 and "bias" not in name.rpartition(".")[2])
    excluding = [note for note in notes if re.match(rf"[\d,]+ weights of the layers are not {done}, because", note)]
    left = sum(int(note.partition(" ")[0].replace(",", "")) for note in excluding)
    require(counted + left == whole, f"{counted:,} weights are {done}, notes exclude {left:,}, of {whole:,}")
    return excluding[0] if excluding else None


def left_out(notes: list[str], done: str) -> list[str]:
    """The notes of a report that exclude a part of the stack; other stacks are kinds of their own here."""
    return [note for note in notes if f"not {done}" in note and "names them" not in note]


def told_weights(notes: list[str], sizes: dict[str, int]) -> int:
    """The number of weights that notes of a report exclude.

    Args:
        notes: those of `quantize`.
        sizes: name -> number of weights, of each matrix and each bank of experts.
    """
    told = 0
    for note in notes:
        if found := re.search(r"of ([\d,]+) weights (?:are )?not quantized", note):
            told += int(found[1].replace(",", ""))
        elif " is not quantized: " in note:
            name = note.partition(" is not quantized: ")[0]
            told += sum(size for matrix, size in sizes.items() if matrix == name or matrix.startswith(f"{name}."))
    return told


@torch.no_grad()
def cut_to_ranks(model: Any, ranks: dict[str, int]) -> None:
    """Replaces these matrices by those of a lower rank that are nearest to them."""
    for name, rank in ranks.items():
        owner, _, key = name.rpartition(".")
        holder = model.get_submodule(owner)
        weight = holder._parameters[key] if key in holder._parameters else holder.get_submodule(key).weight
        U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
        weight.copy_(U[..., :rank] * S[..., None, :rank] @ V[..., :rank, :])


@torch.no_grad()
def zeroed_as(narrower: Any, intact: Any) -> Any:
    """The intact model with zeros for the rows and columns of its matrices that the narrower one lacks."""
    smaller = dict(narrower.named_parameters())
    for name, weight in intact.named_parameters():
        left = smaller[name]
        if weight.dim() == 3 and left.shape != weight.shape:
            for expert, own in zip(weight, left, strict=True):
                _zero_missing(name, expert, own)
            continue
        if name.endswith("_bias"):  # of a bank: its experts have lost other rows each, and zero columns read them
            continue
        if weight.dim() != 2 or left.shape == weight.shape:
            continue
        cut, kept = _zero_missing(name, weight, left)
        module = intact.get_submodule(name.rpartition(".")[0])
        if getattr(module, "bias", None) is not None and cut == int(isinstance(module, Conv1D)):
            module.bias[~kept] = 0
    return intact


def _zero_missing(name: str, weight: torch.Tensor, left: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Sets rows or columns to zero that a matrix has lost; returns the dimension and which are kept."""
    cut = 0 if left.shape[0] != weight.shape[0] else 1
    here, there = weight.movedim(cut, 0), left.movedim(cut, 0)
    rows = {row.numpy().tobytes() for row in there}
    kept = torch.tensor([row.numpy().tobytes() in rows for row in here])
    require(int(kept.sum()) == len(there), f"{name} has other rows than the intact matrix")
    here[~kept] = 0
    return cut, kept
