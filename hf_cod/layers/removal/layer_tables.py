"""Modules outside of the layers that compute something for each of them, such as Gemma 3n's embeddings by layer.

A *table* is an embedding or a Linear whose outputs are blocks, one for each layer: depth * width channels. Tables are
found by building the model on the meta device from its config before and after a change. That their blocks are in the
order of the layers is measured by `marked_runs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.outside import Place, build_outside, changed_settings, determined
from hf_cod.layers.removal.wording import Wording
from hf_cod.layers.stack import DecoderLayers


@dataclass(frozen=True)
class LayerTables:
    """What depends on the number of layers outside of them.

    Attributes:
        stack: the layers, of which `kept` (their old indices) are left.
        depth: the number of layers before.
        widths: name of a table -> its output channels for each layer.
        settings: (name of a module, attribute) -> the number or list for the kept layers.
        determined: the attributes of modules outside that are as the config says.
    """

    stack: DecoderLayers
    kept: list[int]
    depth: int
    widths: dict[str, int] = field(default_factory=dict)
    settings: dict[Place, Any] = field(default_factory=dict)
    determined: set[Place] = field(default_factory=set)
    _hooks: list[Any] = field(default_factory=list)

    @property
    def channels(self) -> dict[str, int]:
        """Name of a table -> its output channels before."""
        return {name: self.depth * width for name, width in self.widths.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight of the tables for the kept layers."""
        found = {}
        for name, module in self._modules():
            for key, p in module.named_parameters(recurse=False):
                shape = [*p.shape]
                shape[_dimension(module)] = len(self.kept) * self.widths[name]
                found[f"{name}.{key}"] = tuple(shape)
        return found

    def select(self, changes: Changes) -> None:
        """Makes the tables return the blocks of the kept layers, and the settings fit; no weight is copied.

        To be called when the stack is shortened.
        """
        for (name, key), value in self.settings.items():
            changes.set(self.stack.model.get_submodule(name), key, value)
        for name, module in self._modules():
            handle = module.register_forward_hook(_selecting(self.depth, self.widths[name], self.kept))
            changes.call(handle.remove)
            self._hooks.append(handle)

    def check_plain(self, wording: Wording) -> None:
        """Checks that the weights of the tables can be cut.

        Raises:
            ValueError: adapters, quantized, offloaded or tied weights.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in self.stack.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for name, module in self._modules():
            p: Any = getattr(module, "weight", None)
            if not isinstance(module, (nn.Embedding, nn.Linear)):
                told = f"an adapter ({type(module).__module__}.{type(module).__name__})"
            elif type(p) is not nn.Parameter:
                told = f"{type(p).__name__} in {type(module).__name__}"
            elif not p.is_floating_point():
                told = f"weights of {p.dtype}"
            elif p.is_meta and hasattr(module, "_hf_hook"):
                told = "offloaded weights"
            elif len(names[id(p)]) > 1:
                told = f"weights that {next(other for other in names[id(p)] if other != f'{name}.weight')} shares"
            else:
                continue
            raise ValueError(
                f"model: expected plain weights in memory of {name}, which has a block for each layer, got {told}; use "
                f"{wording.temporary}, or load the model without quantization, adapters and offloading"
            )

    def cut(self, changes: Changes) -> None:
        """Replaces what `select` does by smaller weights."""
        for handle in self._hooks:
            handle.remove()
        for name, module in self._modules():
            dimension, width = _dimension(module), self.widths[name]
            for key, p in list(module.named_parameters(recurse=False)):
                at = dimension if p.dim() > 1 else 0
                index = torch.tensor(self.kept, device=p.device)
                blocks = p.detach().unflatten(at, (self.depth, width)).index_select(at, index).flatten(at, at + 1)
                changes.set(module, key, nn.Parameter(blocks, requires_grad=p.requires_grad))
            changes.set(module, "embedding_dim" if dimension else "out_features", len(self.kept) * width)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self.stack.model.get_submodule(name)) for name in self.widths)


def find_layer_tables(stack: DecoderLayers, kept: list[int], mend: Callable[[Changes], None]) -> LayerTables:
    """What outside of the layers depends on their number; nothing if the model cannot be built from its config.

    Args:
        stack: the layers, before any change.
        kept: the indices of those that will be left.
        mend: changes the config so that it describes these; undone here.
    """
    nothing = LayerTables(stack, kept, len(stack))
    trial = Changes()
    try:
        before = build_outside(stack)
        mend(trial)
        after = build_outside(stack)
    except Exception:  # whatever a config or a model raises for it; `drop` reports the reason
        return nothing
    finally:
        trial.undo()
    widths = _widths(before.channels, after.channels, len(stack), len(kept))
    settings = changed_settings(stack.model, before, after, len(stack), kept, widths)
    return LayerTables(stack, kept, len(stack), widths, settings, determined(stack.model, before, widths))


def _widths(before: dict[str, int], after: dict[str, int], depth: int, left: int) -> dict[str, int]:
    found = {}
    for name, channels in before.items():
        width, rest = divmod(channels, depth)
        if channels != after.get(name) == width * left and not rest:
            found[name] = width
    return found


def _selecting(depth: int, width: int, kept: list[int]) -> Callable[..., Tensor]:
    def select(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        index = torch.tensor(kept, device=output.device)
        return output.unflatten(-1, (depth, width)).index_select(-2, index).flatten(-2)

    return select


def _dimension(module: nn.Module) -> int:
    """The dimension of a weight that has the output channels."""
    return 1 if isinstance(module, nn.Embedding) else 0
