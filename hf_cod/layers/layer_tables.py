"""Modules outside of the layers that compute something for each of them, such as Gemma 3n's embeddings by layer.

A *table* is an embedding or a Linear whose outputs are blocks, one for each layer: depth * width channels. Tables are
found by building the model on the meta device from its config before and after a change. That their blocks are in the
order of the layers is measured: the model runs on a few tokens with layers that return their input, before and after,
and each kept layer has to get the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.display import one_line
from hf_cod.layers.config_surgery import Changes
from hf_cod.layers.devices import check_in_memory, execution_device
from hf_cod.layers.modes import modules_restored
from hf_cod.layers.outside import build_outside, changed_numbers
from hf_cod.layers.partial_forward import running_only
from hf_cod.layers.probe_inputs import probe_inputs
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers

# Relative to the largest value. Products with fewer rows may be rounded otherwise, also in half precision; another
# block is another number altogether.
TOLERANCE = 0.03


@dataclass(frozen=True)
class _Seen:
    """One run with layers that return their input: the tensors that each layer gets, and the output of the model."""

    given: list[list[Tensor]]
    output: Tensor


@dataclass(frozen=True)
class LayerTables:
    """What depends on the number of layers outside of them.

    Attributes:
        stack: the layers, of which `kept` (their old indices) are left.
        depth: the number of layers before.
        widths: name of a table -> its output channels for each layer.
        numbers: (name of a module, attribute) -> the number for the kept layers.
    """

    stack: DecoderLayers
    kept: list[int]
    depth: int
    widths: dict[str, int] = field(default_factory=dict)
    numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    _before: _Seen | None = None
    _hooks: list[Any] = field(default_factory=list)

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
        """Makes the tables return the blocks of the kept layers, and the numbers fit; no weight is copied.

        To be called when the stack is shortened.
        """
        for (name, key), number in self.numbers.items():
            changes.set(self.stack.model.get_submodule(name), key, number)
        for name, module in self._modules():
            handle = module.register_forward_hook(_selecting(self.depth, self.widths[name], self.kept))
            changes.call(handle.remove)
            self._hooks.append(handle)

    def check(self) -> None:
        """Checks, when config and stack are those of the kept layers, that each of these gets what it got before.

        Raises:
            ValueError: the blocks of a table are in another order, or are used for something else.
        """
        if self._before is None:
            return
        try:
            now = _run(self.stack, {})
            reason = _difference(self._before, now, self.kept)
        except Exception as error:  # whatever the forward of a model raises
            reason = f"{type(error).__name__}: {one_line(str(error))}"
        if reason:
            raise ValueError(
                f"layers: expected weights outside of the layers with one block for each, got {', '.join(self.widths)} "
                f"in another order, or with another use ({reason})"
            )

    def check_plain(self) -> None:
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
                "skip, or load the model without quantization, adapters and offloading"
            )

    def cut(self, changes: Changes) -> None:
        """Replaces what `select` does by smaller weights, and checks the model again."""
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
        self.check()

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
    numbers = changed_numbers(stack.model, before, after, widths)
    seen = None
    if widths and _has_values(stack.model):
        try:
            seen = _run(stack, {name: len(stack) * width for name, width in widths.items()})
        except Exception:  # whatever the forward of a model raises: the order of the blocks is unknown
            widths = {}
    return LayerTables(stack, kept, len(stack), widths, numbers, seen)


def _widths(before: dict[str, int], after: dict[str, int], depth: int, left: int) -> dict[str, int]:
    found = {}
    for name, channels in before.items():
        width, rest = divmod(channels, depth)
        if channels != after.get(name) == width * left and not rest:
            found[name] = width
    return found


def _has_values(model: nn.Module) -> bool:
    try:
        check_in_memory(model)
    except ValueError:
        return False
    return True


def _selecting(depth: int, width: int, kept: list[int]) -> Callable[..., Tensor]:
    def select(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        index = torch.tensor(kept, device=output.device)
        return output.unflatten(-1, (depth, width)).index_select(-2, index).flatten(-2)

    return select


def _dimension(module: nn.Module) -> int:
    """The dimension of a weight that has the output channels."""
    return 1 if isinstance(module, nn.Embedding) else 0


@torch.no_grad()
def _run(stack: DecoderLayers, channels: dict[str, int]) -> _Seen:
    """Runs the model with layers that return their input; modules of these output channels have to run."""
    given: list[list[Tensor]] = [[] for _ in stack]
    seen: dict[str, int] = {}

    def keep(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: given[index].extend(t.cpu() for t in _tensors((args, kwargs)))

    def measure(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output.shape[-1]})

    inputs, where = probe_inputs(stack.model, device=execution_device(stack.model))
    handles = [stack.model.get_submodule(name).register_forward_hook(measure(name)) for name in channels]
    try:
        with modules_restored(stack.model), evaluation_mode(stack), running_only(stack, range(0), None), where:
            for index, layer in enumerate(stack.module_list.children()):
                layer.register_forward_pre_hook(keep(index), with_kwargs=True)
            output = stack.trunk(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if seen != channels:
        raise ValueError(f"expected modules of {channels} channels, got {seen}")
    return _Seen(given, output if isinstance(output, Tensor) else output[0])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _difference(before: _Seen, now: _Seen, kept: list[int]) -> str | None:
    for index, old in enumerate(kept):
        if len(now.given[index]) != len(before.given[old]):
            return f"layer {old} gets other inputs"
        if not all(map(_alike, now.given[index], before.given[old])):
            return f"layer {old} gets other values"
    return None if _alike(now.output, before.output) else "its outputs differ even without the layers"


def _alike(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(got, expected)
    got, expected = got.float(), expected.float()
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
