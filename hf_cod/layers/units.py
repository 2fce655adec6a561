"""Heads and channels that can be removed from a layer independently of its other parts.

Like `stack.py`, this file depends on the internals of models: the tables list the supported structures. A structure
that fits none exactly (norms over all heads, a number per head, experts, latent attention) is not narrowed, and the
reason is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_cod.layers.orientation import is_plain, shape_of
from hf_cod.layers.stack import DecoderLayers, is_norm, walk

HEADS, CHANNELS = KINDS = ("heads", "channels")
# (attention module, its matrices that read the hidden state, the one that writes to it) inside a layer.
_ATTENTIONS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj"),
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.out_proj"),
    ("attention", ("q_proj", "k_proj", "v_proj"), "attention.o_proj"),
    ("attention.self", ("query", "key", "value"), "attention.output.dense"),
    ("attn", ("c_attn",), "attn.c_proj"),
)
# (the matrices that read the hidden state, the one that writes to it) inside a layer.
_MLPS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("mlp.fc1",), "mlp.fc2"),
    (("fc1",), "fc2"),
    (("intermediate.dense",), "output.dense"),
)
# Fused matrices and their number of parts, stacked along the rows.
_FUSED = {"c_attn": 3, "gate_up_proj": 2}
_HEAD_SIZES = ("head_dim", "attention_head_size")
# Attributes proportional to the number of heads of an attention, or of channels of an MLP.
_NUMBERS = {
    HEADS: ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size"),
    CHANNELS: ("intermediate_size",),
}


@dataclass(frozen=True)
class Units:
    """The heads or channels of one layer, each of which can be removed separately.

    Attributes:
        kind: "heads" or "channels".
        count: number of units; for heads, of key and value heads, each with all query heads that read it.
        heads: number of query heads in one unit; 1 for channels.
        readers: name -> number of fused parts of each matrix whose rows, in each part, are those of unit 0, unit 1, ...
        writer: name of the matrix whose columns are those of unit 0, unit 1, ...
        numbers: module's name -> name of its attribute -> contribution of one unit to it.
        weights: number of weights of one unit in the matrices.
    """

    kind: str
    count: int
    heads: int
    readers: dict[str, int]
    writer: str
    numbers: dict[str, dict[str, int]]
    weights: int


@dataclass(frozen=True)
class LayerUnits:
    """The removable units of a layer.

    Attributes:
        found: at most one entry of each kind.
        whole: sentences that say why a part is not narrowed.
    """

    found: list[Units] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def __getitem__(self, kind: str) -> Units | None:
        return next((units for units in self.found if units.kind == kind), None)


def find_units(stack: DecoderLayers, index: int) -> LayerUnits:
    """The heads and channels of a layer that can be removed."""
    layer = _Layer(stack, index)
    units = LayerUnits()
    for find, what in ((_heads, "attention"), (_channels, "MLP")):
        found = find(layer)
        if isinstance(found, Units):
            units.found.append(found)
        else:
            units.whole.append(f"{what} is not narrowed: {found}")
    return units


class _Layer:
    """The modules of a layer, by names inside it."""

    def __init__(self, stack: DecoderLayers, index: int) -> None:
        self.prefix = f"{stack.layers_path}.{index}."
        self.modules = dict(walk(stack[index], self.prefix[:-1]))
        self.has_experts = bool(stack.experts(index))

    def plain(self, *names: str) -> bool:
        """Whether all of these are Linears or Conv1D."""
        return all(is_plain(self.modules.get(self.prefix + name)) for name in names)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a matrix."""
        return shape_of(self.modules[self.prefix + name])

    def number(self, module: str, *names: str) -> int | None:
        """The first of these integer attributes that a module has."""
        values = vars(self.modules[self.prefix + module]) if self.prefix + module in self.modules else {}
        return next((values[name] for name in names if type(values.get(name)) is int), None)

    def units(self, kind: str, count: int, heads: int, module: str, readers: tuple[str, ...], writer: str) -> Units:
        own = {name: self.number(module, name) for name in _NUMBERS[kind]}
        numbers = {name: value // count for name, value in own.items() if value and value % count == 0}
        weights = sum(math.prod(self.shape(name)) for name in (*readers, writer)) // count
        named = {self.prefix + name: _parts(name) for name in readers}
        place = {self.prefix + module: numbers} if numbers else {}
        return Units(kind, count, heads, named, self.prefix + writer, place, weights)

    def others(self, module: str, matrices: tuple[str, ...], head_dim: int | None = None) -> list[str]:
        """Parameters of a module other than those of its matrices and of norms over single heads."""
        known = [self.prefix + name for name in matrices]
        inside = self.prefix + module
        found = []
        for name, m in self.modules.items():
            if (name == inside or name.startswith(inside + ".")) and name not in known:
                own = list(m.named_parameters(recurse=False))
                if own and not (is_norm(m) and head_dim and all(p.numel() == head_dim for _, p in own)):
                    found += [f"{name.removeprefix(self.prefix)}.{key}" for key, _ in own]
        return found


def _heads(layer: _Layer) -> Units | str:
    for module, own, writer in _ATTENTIONS:
        readers = tuple(f"{module}.{name}" for name in own)
        if not layer.plain(*readers, writer):
            continue
        size = layer.number(module, *_HEAD_SIZES)
        rows, (_, width) = [layer.shape(name)[0] for name in readers], layer.shape(writer)
        others = layer.others(module, (*readers, writer), size)
        if others:
            return f"{others[0]} applies to all heads"
        keys = width if len(rows) == 1 else rows[1]
        fits = rows == ([3 * width] if len(rows) == 1 else [width, keys, keys])
        if not size or not fits or keys % size or width % keys:
            return f"{rows} rows and {width} columns do not fit heads of size {size}"
        return layer.units(HEADS, keys // size, width // keys, module, readers, writer)
    return "unknown names of its query, key, value and output matrices"


def _channels(layer: _Layer) -> Units | str:
    for readers, writer in _MLPS:
        if not layer.plain(*readers, writer):
            continue
        rows, (_, width) = [layer.shape(name)[0] for name in readers], layer.shape(writer)
        module = writer.rpartition(".")[0]
        others = layer.others(module, (*readers, writer)) if module == "mlp" else []
        if others:
            return f"{others[0]} applies to all channels"
        if rows != [_parts(name) * width for name in readers]:
            return f"{rows} rows do not fit {width} columns"
        return layer.units(CHANNELS, width, 1, module, readers, writer)
    return "experts are not supported" if layer.has_experts else "unknown names of its matrices"


def _parts(name: str) -> int:
    return _FUSED.get(name.rpartition(".")[2], 1)
