"""What a model does around its layers, found by running it with layers that only add a mark to their input.

The mark of a layer is a vector of its own. Before layers are removed, those to be removed add nothing, as if they
returned their input. In the shorter model each kept layer has to get the same inputs, and the model has to return the
same. Layers that are to run several times add nothing either, so that each time gets the same. Otherwise the model does
something to a layer by its index: it adds features after it (Qwen3-VL), hands on its
state (CLIPSeg), merges tokens there (MiniCPM-V), or has a block for it in a table.

In the same runs each layer that reads its index is run on random hidden states, with what else it gets
(`index_reads.py`): it has to compute the same at its new index.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_cod.io.display import one_line
from hf_cod.layers.devices import check_in_memory, execution_device, random_state_restored
from hf_cod.layers.modes import modules_restored
from hf_cod.layers.partial_forward import Passage, exchanged_layers, state_of
from hf_cod.layers.probe_inputs import image_inputs, probe_inputs
from hf_cod.layers.removal.index_reads import IndexReads, check_computed
from hf_cod.layers.running import Place, evaluation_mode, hidden_input, tensors_of
from hf_cod.layers.stack import DecoderLayers

logger = logging.getLogger(__name__)

# Relative to the largest value. Products with fewer rows may be rounded otherwise, also in half precision; another
# layer has another mark altogether.
TOLERANCE = 0.03
# Models that a warning has named, because many sets of layers are tried before a search.
_named: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class _Run:
    """The tensors that each layer gets, those that it computes alone if it reads its index, those that the model
    returns, and the output channels of modules that ran."""

    given: list[dict[Place, Tensor]]
    computed: list[dict[Place, Tensor]]
    output: dict[Place, Tensor]
    channels: dict[str, int]


@dataclass
class _Returned:
    """What the first layer returns beside its hidden state, and the size of the states; found in the first run."""

    found: bool = False
    rest: tuple[Any, ...] | None = None
    scale: float = 1.0


@dataclass
class MarkedRuns:
    """Runs of the intact model, with which runs of the shorter one are compared.

    Attributes:
        stack: the layers; all of them when this is made, the kept ones when `check` is called.
        kept: the old indices of the layers that will be left; of a layer that runs several times, as often.
        watched: names of modules whose output channels are recorded.
    """

    stack: DecoderLayers
    kept: Sequence[int]
    watched: Iterable[str] = ()
    _probes: list[tuple[dict[str, Any], AbstractContextManager[Any]]] = field(default_factory=list)
    _before: list[_Run | None] = field(default_factory=list)
    _returned: _Returned = field(default_factory=_Returned)
    _reads: IndexReads = field(default_factory=IndexReads)

    def __post_init__(self) -> None:
        try:
            check_in_memory(self.stack.model)
        except ValueError:  # weights without values
            return
        device = execution_device(self.stack.model)
        self._probes.append(probe_inputs(self.stack.model, device=device))
        images = image_inputs(self.stack.model)
        if images is not None:
            self._probes.append(probe_inputs(self.stack.model, images, device))
        marks = [self._mark(index) for index in range(len(self.stack))]
        why = ""
        for probe in self._probes:
            try:
                self._before.append(self._run(*probe, marks))
            except Exception as error:  # whatever a model raises on inputs that may be none for it
                self._before.append(None)
                why = f": {type(error).__name__}: {one_line(str(error))[:150]}"
        if not self.ran and self.stack.model not in _named:
            _named.add(self.stack.model)
            logger.warning(
                "%s was not run to find out what it does at a layer by its index, because its layers do not run on a "
                "small input that its config describes%s",
                type(self.stack.model).__name__,
                why,
            )

    def _mark(self, layer: int) -> int | None:
        """The mark of a layer; none if it is removed or runs several times."""
        return layer if self.kept.count(layer) == 1 else None

    @property
    def possible(self) -> bool:
        """Whether the weights have values; otherwise nothing is run or compared."""
        return bool(self._probes)

    @property
    def ran(self) -> bool:
        """Whether a layer ran in one of the runs."""
        return any(run is not None and any(run.given) for run in self._before)

    @property
    def read(self) -> set[str]:
        """Names of what layers read while they run: their index, and counts and lists of their config."""
        return self._reads.names

    @property
    def channels(self) -> dict[str, int]:
        """Name of a watched module -> its output channels; those that ran on no input are missing."""
        return {name: size for run in self._before if run is not None for name, size in run.channels.items()}

    def difference(self) -> str | None:
        """What a kept layer gets otherwise in the shorter model, or what that returns otherwise; None if nothing.

        Raises:
            ValueError: a kept layer gets the same and computes something else.
        """
        for probe, before in zip(self._probes, self._before, strict=True):
            if before is None:
                continue
            try:
                now = self._run(*probe, [*map(self._mark, self.kept)])
            except Exception as error:  # whatever the forward of a model raises
                return f"{type(error).__name__}: {one_line(str(error))[:150]}"
            found = _difference(before, now, self.kept)
            if found is not None:
                return found
            check_computed(self.stack.model, before.computed, now.computed, self.kept)
        return None

    def check(self) -> None:
        """Checks, when config and stack are those of the kept layers, that each of these gets what it got before, and
        computes the same at its new index.

        Raises:
            ValueError: it gets or computes something else, or the model returns something else.
        """
        reason = self.difference()
        if reason is not None and self.watched:
            tables = ", ".join(self.watched)
            raise ValueError(
                f"layers: expected weights outside of the layers with one block for each, got {tables} in another "
                f"order, or with another use ({reason})"
            )
        if reason is not None:
            fewer = len({*self.kept}) == len(self.kept)
            how, way = ("without the removed layers", "remove") if fewer else ("with the repeated layers", "repeat")
            raise ValueError(
                f"layers: expected layers that {type(self.stack.model).__name__} treats alike, got others: "
                f"{how} it does by index what belongs to other ones ({reason}); {way} other layers"
            )

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any], where: AbstractContextManager[Any], marks: Sequence[int | None]) -> _Run:
        """Runs the model with layers that add these marks."""
        model, layers = self.stack.model, [*self.stack]
        given: list[dict[Place, Tensor]] = [{} for _ in layers]
        computed: list[dict[Place, Tensor]] = [{} for _ in layers]
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        channels: dict[str, int] = {}
        marking = OrderedDict(
            (str(i), _Marking(layer, mark, self._returned, _recorder(given[i], copies), self._alone(computed[i])))
            for i, (layer, mark) in enumerate(zip(layers, marks, strict=True))
        )
        handles = [model.get_submodule(name).register_forward_hook(_measure(name, channels)) for name in self.watched]
        try:
            with ExitStack() as block:
                block.enter_context(modules_restored(model))
                block.enter_context(evaluation_mode(self.stack))
                block.enter_context(exchanged_layers(self.stack, marking))
                block.enter_context(where)
                block.enter_context(random_state_restored(model, seed=0))  # ViT MAE chooses patches at random
                output = model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        by_layer = (len(layers), len(layers) + 1)
        returned = {place: t.cpu() for place, t in tensors_of(output, by_layer=by_layer)}
        return _Run(given, computed, returned, channels)

    def _alone(self, computed: dict[Place, Tensor]) -> Callable[..., None]:
        return lambda layer, args, kwargs: computed.update(self._reads.computed(layer, args, kwargs))


class _Marking(Passage):
    """Returns its input, with a mark added. The first one to run calls its layer, to find out what that returns."""

    def __init__(
        self,
        layer: nn.Module,
        mark: int | None,
        returned: _Returned,
        record: Callable[..., None],
        alone: Callable[..., None],
    ) -> None:
        super().__init__(layer, None, lambda: returned.rest)
        self.__dict__.update(mark=mark, returned=returned, record=record, alone=alone)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        self.record(hidden, args, kwargs)
        self.alone(self.layer, args, kwargs)
        if not self.returned.found:
            scale = float(hidden.float().std())
            self.returned.scale = scale if 0 < scale < math.inf else 1.0  # not NaN, by which all would be alike
            # Without the layer's hooks, with which transformers would capture its output beside that of this module,
            # and not compiled.
            layer = getattr(self.layer, "_orig_mod", self.layer)
            self.returned.rest = state_of(layer.forward(*args, **kwargs))[1]
            self.returned.found = True
        if self.mark is not None:
            mark = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(self.mark), device="cpu")
            hidden = hidden + (self.returned.scale * mark).to(hidden)
        return self.with_rest(hidden)


def _recorder(given: dict[Place, Tensor], copies: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def record(hidden: Tensor, args: Any, kwargs: Any) -> None:
        for place, tensor in tensors_of((args, kwargs)):
            # Masks are the same tensor for all layers; the model may change the hidden state in place.
            same = copies.setdefault(id(tensor), (tensor, tensor.cpu()))[1]
            given[place] = hidden.cpu().clone() if tensor is hidden else same

    return record


def _measure(name: str, channels: dict[str, int]) -> Callable[..., None]:
    return lambda module, args, output: channels.update({name: output.shape[-1]})


def _difference(before: _Run, now: _Run, kept: Sequence[int]) -> str | None:
    for index, old in enumerate(kept):
        expected, got = before.given[old], now.given[index]
        # The first layer of T5 gets no position biases, which the others get from it.
        if bool(expected) != bool(got) or not all(_alike(got[at], expected[at]) for at in expected.keys() & got.keys()):
            return f"layer {old} gets other values"
    same = before.output.keys() & now.output.keys()
    return None if all(_alike(now.output[at], before.output[at]) for at in same) else "it returns other values"


def _alike(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(got, expected)
    got, expected = got.float(), expected.float()
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
