"""Finds the heads and channels of a layer by measurement, on a copy with random weights.

A *writer* is a matrix whose input columns fall into units; its *readers* are the matrices that ran since the writer
before it, and act on its input. The unit of a column is its number divided by the width of a unit, and the unit of
each row of a reader is read bit by bit: one backward pass from the columns of all units whose number has the bit, and
one from the others. A row that belongs to one unit acts in exactly one of the two for each bit. The smallest width of
units for which no row belongs to some units only is that of the model: 1 for the channels of an MLP, the size of a head
for attention, that of a group of heads where these share keys and values. Interleaved, blocked and unequal parts of
fused matrices, gates, and matrices that all units share (multi-query attention, latent attention) need no case of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.display import quoted
from hf_cod.io.text import Batch
from hf_cod.layers.expert_units import ExpertUnits, expert_units, other_sets, sizes_of
from hf_cod.layers.layer_copies import LayerCopy, NotRunError, copy_layers
from hf_cod.layers.matrix_calls import MatrixCall, recorded_calls
from hf_cod.layers.orientation import is_linear, shape_of
from hf_cod.layers.row_owners import mixes_tokens, owners_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.unit_checks import first_that_fits
from hf_cod.layers.units import CHANNELS, EXPERTS, HEADS, KINDS, Changes, LayerUnits, Units
from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES
from hf_cod.models.shaping import check_shapeable, lost_in_reload

_PARTS = {HEADS: "attention is", CHANNELS: "MLP is", EXPERTS: "experts are"}
_HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "d_kv", "key_value_proj_dim")


def find_units(stack: DecoderLayers, index: int) -> LayerUnits:
    """The heads and channels of a layer that can be removed."""
    return _found(stack, [index], None)[index]


def find_all_units(stack: DecoderLayers, batches: Sequence[Batch] | None = None) -> list[LayerUnits]:
    """The heads and channels of each layer that can be removed. Layers of one structure are measured once.

    Args:
        stack: the layers.
        batches: inputs, of which the first is used for layers that do not run on text, such as those of a vision tower;
            default: an image of the size that the config has, if the form of images is known.
    """
    found = _found(stack, range(len(stack)), batches[0] if batches else None)
    return [found[index] for index in range(len(stack))]


def _found(stack: DecoderLayers, indices: Any, batch: Batch | None) -> dict[int, LayerUnits]:
    structures: dict[Any, list[int]] = {}
    for index in indices:
        structures.setdefault(_structure(stack[index]), []).append(index)
    copies = copy_layers(stack, [alike[0] for alike in structures.values()], batch)
    found = {}
    for alike in structures.values():
        has_experts = bool(stack.expert_sets(alike[0]))
        measured = _measured(copies.pop(alike[0]), has_experts)
        for index in alike:
            prefix = f"{stack.layers_path}.{index}."
            found[index] = LayerUnits([units.inside(prefix) for units in measured.found], list(measured.whole))
    _exclude_lost(stack, found)
    return found


def _exclude_lost(stack: DecoderLayers, found: dict[int, LayerUnits]) -> None:
    """Excludes units of modules that a reloaded model would replace by those of other sizes."""
    changes: Changes = {}
    for units in (units for layer in found.values() for units in layer.found):
        for name, sizes in sizes_of(units, units.count - 1).items():
            changes[name] = {**changes.get(name, {}), **sizes}
    try:
        check_shapeable(stack.model)
    except ValueError:
        return  # its models are not saved with shapes of their own; `narrow` refuses them
    try:
        lost = lost_in_reload(stack.model, changes)
    except Exception as error:  # whatever a constructor raises
        reason = f"a reloaded model cannot have fewer ({quoted(error)})"
        lost = dict.fromkeys(changes, reason)
    for layer in found.values():
        for units in list(layer.found):
            names = [name for name in sizes_of(units, 1) if name in lost]
            if names:
                layer.found.remove(units)
                layer.whole.append(f"{_PARTS[units.kind]} not narrowed: {lost[names[0]]}")


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """What layers of equal structure have in common: classes, shapes, plain settings."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, (int, float, str)) and key not in (*LAYER_INDEX_ATTRIBUTES, "training")
            ),
        )
        for name, module in layer.named_modules()
    )


def _measured(taken: LayerCopy | NotRunError, has_experts: bool) -> LayerUnits:
    if isinstance(taken, NotRunError):
        reasons: dict[str, str] = dict.fromkeys(KINDS, str(taken))
        chosen: dict[str, Units] = {}
    else:
        chosen, reasons = _chosen(taken, (HEADS, CHANNELS))
        if has_experts:
            _choose_experts(taken, chosen, reasons)
    kinds = [kind for kind in KINDS if has_experts or kind != EXPERTS]
    if has_experts and CHANNELS not in reasons:
        kinds.remove(CHANNELS)  # no shared expert
    nothing = {
        HEADS: "no matrix has columns that belong to single heads",
        CHANNELS: "no matrix has columns that belong to single channels",
        EXPERTS: "no matrix has columns that belong to single channels of an expert",
    }
    whole = [f"{_PARTS[k]} not narrowed: {reasons.get(k, nothing[k])}" for k in kinds if k not in chosen]
    if isinstance(experts := chosen.get(EXPERTS), ExpertUnits) and isinstance(taken, LayerCopy):
        whole += [f"{name}: not narrowed, beside a larger set of experts" for name in other_sets(taken.layer, experts)]
    return LayerUnits([chosen[kind] for kind in KINDS if kind in chosen], whole)


def _choose_experts(taken: LayerCopy, chosen: dict[str, Units], reasons: dict[str, str]) -> None:
    """Adds the channels of the largest set of experts of which fewer equal zeroed ones, or the reason why none do."""
    try:
        for options in expert_units(taken.layer, taken.width):
            fitting = first_that_fits(taken, options)
            lost = _replaced(taken, fitting) if isinstance(fitting, Units) else fitting
            if isinstance(fitting, Units) and lost is None:
                chosen[EXPERTS] = fitting
                return
            reasons.setdefault(EXPERTS, str(lost))
    except Exception as error:  # as in `_chosen`
        reasons[EXPERTS] = _alone(error)


def _alone(error: Exception) -> str:
    return f"it cannot be measured alone ({quoted(error)})"


def _chosen(taken: LayerCopy, kinds: Sequence[str]) -> tuple[dict[str, Units], dict[str, str]]:
    """Kind -> the units of the layer, and for kinds without: why there are none."""
    chosen: dict[str, Units] = {}
    reasons: dict[str, str] = {}
    try:
        for plain_norms in (False, True):
            with torch.enable_grad():
                candidates = _candidates(taken, plain_norms)
            for options in candidates:
                kind = options[0].kind
                if kind not in kinds or kind in chosen:
                    continue
                fitting = first_that_fits(taken, options)
                lost = _replaced(taken, fitting) if isinstance(fitting, Units) else fitting
                if isinstance(fitting, Units) and lost is None:
                    chosen[kind] = fitting
                else:
                    reasons.setdefault(kind, str(lost))
    except Exception as error:  # whatever a layer raises without the rest of its model
        reasons = {kind: reasons.get(kind, _alone(error)) for kind in kinds}
    return chosen, reasons


def _replaced(taken: LayerCopy, units: Units) -> str | None:
    """Why units cannot be removed: the model replaces their module while it runs, and would replace a smaller one."""
    lost = next((name for name in sizes_of(units, 1) if name in taken.replaced), None)
    return None if lost is None else f"the model replaces {lost} while it runs"


def _candidates(taken: LayerCopy, plain_norms: bool) -> list[list[Units]]:
    """For each writer the units that the gradients show, the smallest first; the writers with most weights first.

    Args:
        taken: the copy.
        plain_norms: whether norms over all rows of a matrix only multiply: each of their outputs then depends on one
            input, as if the mean were a constant.
    """
    taken = taken.again()  # a layer may keep a state of its run
    with recorded_calls(taken.layer, plain_norms) as calls:
        taken.run()
    vectors = {
        f"{name}.{key}".lstrip("."): p
        for name, module in taken.layer.named_modules()
        if not is_linear(module)
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 1 and p.numel() > 1
    }
    found: list[list[Units]] = []
    pending: list[MatrixCall] = []
    for call in calls:
        to_stream = shape_of(call.module)[0] == taken.width  # latent projections write to other matrices
        options = _units_of(taken, call, pending, vectors) if to_stream else []
        if options:
            found.append(options)
            pending = []
        elif call.output.requires_grad:
            pending.append(call)
    return sorted(found, key=lambda options: -options[0].weights * options[0].count)


def _units_of(
    taken: LayerCopy, writer: MatrixCall, pending: list[MatrixCall], vectors: dict[str, nn.Parameter]
) -> list[Units]:
    """The units of the columns of a matrix, for each width of units with which each row has one unit or all."""
    if not writer.input.requires_grad or not pending or any(call.module is writer.module for call in pending):
        return []
    places = {name.partition(".")[0] for name in (writer.name, *(call.name for call in pending))}
    if "." in writer.name:  # else the matrices are in the layer itself
        vectors = {name: p for name, p in vectors.items() if name.partition(".")[0] in places}
    sources = [call.output for call in pending] + [*vectors.values()]
    names = [call.name for call in pending] + [*vectors]
    width = writer.input.shape[-1]
    found: list[Units] = []
    for size in (d for d in range(1, width // 2 + 1) if width % d == 0):
        owners = owners_of(writer.input, sources, width // size)
        if owners is None:
            continue
        own = {name: rows for name, rows in zip(names, owners, strict=True) if (rows >= 0).any()}
        readers = [call for call in pending if call.name in own]
        if not readers and size == 1:
            break  # the matrix depends on these at most as a whole, through the hidden state
        if readers:
            kind = HEADS if mixes_tokens(writer.input, [call.output for call in readers]) else CHANNELS
            part = f"{writer.name.rpartition('.')[0]}."
            beside = [call.output for call in pending if len(part) > 1 and call.name.startswith(part)]
            if kind == CHANNELS and mixes_tokens(writer.input, beside):
                break  # queries that share all keys and values: attention kernels may count on their number
            rows = {call.name: own[call.name] for call in readers}
            found.append(_made(taken, kind, width // size, writer.name, rows, {n: own[n] for n in vectors if n in own}))
            if kind == CHANNELS:
                break
    return found


def _made(
    taken: LayerCopy, kind: str, count: int, writer: str, readers: dict[str, Tensor], vectors: dict[str, Tensor]
) -> Units:
    shapes = {name: shape_of(taken.layer.get_submodule(name)) for name in (*readers, writer)}
    width = shapes[writer][1]
    columns = torch.arange(width) // (width // count)
    weights = width * shapes[writer][0] + sum(int((own >= 0).sum()) * shapes[n][1] for n, own in readers.items())
    heads = 1
    if kind == HEADS:
        scope = writer.partition(".")[0]
        modules = [m for name, m in taken.layer.named_modules() if name.partition(".")[0] == scope]
        sizes = [vars(m).get(key) for key in _HEAD_SIZES for m in modules]
        sizes = [size for size in sizes if type(size) is int and size and (width // count) % size == 0]
        heads = width // count // sizes[0] if sizes else 1
    return Units(kind, count, heads, readers, writer, columns, vectors, {}, weights // count)
