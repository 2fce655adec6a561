"""How a mixture uses its experts: tokens routed to each, their gate weights, and the norms of what it adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.matrix_inputs import check_finite_input, padding_of
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.expert_products import Routed
from hf_cod.layers.expert_routing import observed_experts
from hf_cod.layers.experts import ExpertSet
from hf_cod.layers.inputs import InputCheck
from hf_cod.layers.running import evaluation_mode, hidden_input, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """Sums over the tokens that were routed to each expert of a set.

    Attributes:
        all_tokens: number of tokens that entered the layer.
        tokens: (experts,), int64: number of tokens routed to each.
        weights: (experts,), float64: sum of their gate weights; None if the model shows none.
        norms: (experts,), float64: sum of || g_e(x) f_e(x) ||_2, gate weight times output; None as `weights`.
    """

    all_tokens: int
    tokens: Tensor
    weights: Tensor | None
    norms: Tensor | None


def measure_expert_usage(
    stack: DecoderLayers, batches: Iterable[Batch], *, show_progress: bool = False
) -> dict[str, ExpertUsage]:
    """Name of routed experts -> their usage, from one forward pass over all batches; padding does not count.

    Args:
        stack: the layers.
        batches: dicts for the model's forward.
        show_progress: show a progress bar.

    Raises:
        ValueError: experts that cannot be observed, outputs that are not finite, or padding in a model whose tokens
            cannot be followed to their experts.
    """
    device, checked = execution_device(stack.model), InputCheck(stack.model)
    recorder = _Recorder(stack)
    hook = stack[0].register_forward_pre_hook(recorder.count, with_kwargs=True)
    observed = observed_experts(stack, range(len(stack)), leaves=recorder.add)
    try:
        with torch.no_grad(), evaluation_mode(stack), observed:
            for number, batch in enumerate(progress(batches, "experts", show_progress)):
                checked.check(batch, number)
                inputs = model_inputs(stack.model, to_device(batch, device))
                recorder.start(inputs, number)
                stack.trunk(**inputs)
    finally:
        hook.remove()
    return recorder.found()


class _Recorder:
    def __init__(self, stack: DecoderLayers) -> None:
        self._stack = stack
        sets = [experts for index in range(len(stack)) for experts in routed_sets(stack, index)]
        self._sums = {experts.name: torch.zeros(3, experts.count, dtype=torch.float64) for experts in sets}
        self._all = 0
        self._unweighted: set[str] = set()

    def start(self, inputs: Mapping[str, Any], number: int) -> None:
        """Starts a batch with the inputs of the model."""
        self._mask, self._number = padding_of(self._stack.mask(inputs)), number

    def count(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the first layer: counts tokens."""
        hidden = hidden_input(args, kwargs)
        self._all += int(self._mask.sum()) if self._mask is not None else hidden.shape[0] * hidden.shape[1]

    def add(self, routed: Routed) -> None:
        """Adds what left an expert."""
        name = routed.experts.name
        if name not in self._sums or routed.expert >= routed.experts.count:  # shared, or without matrices
            return
        norms = routed.outputs.detach().float().norm(dim=-1)
        check_finite_input(norms, f"{name}, expert {routed.expert}", self._number)
        rows = torch.stack([torch.ones_like(norms), norms if routed.weights is None else routed.weights.float(), norms])
        if routed.weights is None:
            self._unweighted.add(name)
        if self._mask is not None:
            rows = rows[:, self._real(routed)]
        self._sums[name][:, routed.expert] += rows.double().sum(1).cpu()

    def _real(self, routed: Routed) -> Tensor:
        """(n,): which rows are no padding."""
        assert self._mask is not None
        real = self._mask.flatten().to(routed.outputs.device)
        if routed.tokens is not None:
            return real[routed.tokens]
        if len(routed.outputs) != len(real):
            raise ValueError(
                f"attention_mask: expected none for {routed.experts.name}, whose tokens cannot be followed, got "
                "padding; use samples without padding"
            )
        return real

    def found(self) -> dict[str, ExpertUsage]:
        """The sums."""
        return {
            name: ExpertUsage(self._all, sums[0].long(), *(None if name in self._unweighted else s for s in sums[1:]))
            for name, sums in self._sums.items()
        }


def routed_sets(stack: DecoderLayers, index: int) -> list[ExpertSet]:
    """The experts of a layer among which a router chooses."""
    return [experts for experts in stack.expert_sets(index) if not experts.shared]
