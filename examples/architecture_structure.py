"""What `architectures.py` checks of `pack_sparse`, `repeat` and `drop_experts`, with naive references."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from architecture_comparison import ROUNDING, check_reload, distance, outputs_of, require, same, unchanged_if_refused
from architecture_inputs import batches_for
from architecture_references import generates_alike
from tiny_architectures import Case
from torch import Tensor
from torch.nn import functional as F

from hf_cod import drop_experts, find_decoder_layers, pack_sparse, prune, repeat
from hf_cod.layers.running import evaluation_mode


def has_experts(case: Case) -> bool:
    """Whether layers hold experts, either by the name of a bank or as the package finds them."""
    model = case.build()
    if any(p.dim() == 3 and "expert" in name for name, p in model.named_parameters()):
        return True
    with suppress(ValueError):  # a model whose stack has to be named
        stack = find_decoder_layers(model, case.stack)
        return any(not one.shared for index in range(len(stack)) for one in stack.expert_sets(index))
    return False


def check_pack(case: Case) -> str | None:
    """Packed = sparse, after pruning by magnitude; so is the model that is dense again; a reload is equal."""
    model: Any = case.build()
    prune(model, 0.6, "magnitude", layers_path=case.stack)
    sparse, before = outputs_of(case, model), {name: p.clone() for name, p in model.named_parameters()}
    with unchanged_if_refused(model):
        pack_sparse(model)
    require(len(dict(model.named_parameters())) < len(before), "no matrix is packed")
    same(outputs_of(case, model), sparse, "the packed model", 1e-4)
    check_reload(case, model)
    for name, weight in copy.deepcopy(model).dequantize().named_parameters():
        require(torch.equal(weight, before[name]), f"{name} differs after dequantize()")
    return None


def check_repeat(case: Case) -> str | None:
    """A repeated layer = one that runs on its own output again; generation with a cache = without; a reload is
    equal.
    """
    model = case.build()
    layer = min(1, len(find_decoder_layers(model, case.stack)) - 1)
    with unchanged_if_refused(model):
        repeat(model, layer, layer + 1, layers_path=case.stack)
    expected, why = _twice(case, case.build(), layer)
    if why is None:
        with evaluation_mode(find_decoder_layers(model, case.stack)):  # FSMT has no causal mask with a cache
            same(outputs_of(case, model), expected, "the repeated layer", ROUNDING)
    check_reload(case, model)
    return why or generates_alike(case, model)


@torch.no_grad()
def _twice(case: Case, model: Any, index: int) -> tuple[Tensor, str | None]:
    """The outputs of a model one of whose layers runs twice in each of its runs; and why they may be others."""
    layer = find_decoder_layers(model, case.stack)[index]
    single, states = layer.forward, []

    def double(*args: Any, **kwargs: Any) -> Any:
        output = single(*args, **kwargs)
        parts = [*output.values()] if isinstance(output, dict) else output
        states.append(not isinstance(parts, Tensor) and any(isinstance(one, Tensor) for one in parts[1:]))
        hidden = parts if isinstance(parts, Tensor) else parts[0]
        return single(hidden, *args[1:], **kwargs) if args else single(**{**kwargs, "hidden_states": hidden})

    layer.forward = double
    try:
        with evaluation_mode(find_decoder_layers(model, case.stack)):
            found = outputs_of(case, model)
    finally:
        del layer.forward
    if not states:
        return found, f"layer {index} does not run on the inputs, or not by a call"
    return found, f"layer {index} is not run twice by hand: it returns more than its output" if any(states) else None


def check_drop_experts(case: Case) -> str | None:
    """A quarter of the experts less, or half where only that is possible = a router that never chooses them; a reload
    is equal.
    """
    model = case.build()
    with unchanged_if_refused(model):
        removed = _chosen(case)
        with _masked(case, model, removed) as missed:
            expected = outputs_of(case, model)
        intact = outputs_of(case, model)
        report = drop_experts(model, removed, layers_path=case.stack)
    require(distance(expected, intact) > 0 or bool(missed), "the removed experts have no effect")
    counts = zip(report.layers["experts"], report.layers["experts_left"], strict=True)
    gone, told = sum(before - after for before, after in counts), sum(map(len, removed.values()))
    require(gone == told > 0, f"the report counts {gone} experts less instead of {told}")
    if not missed:
        same(outputs_of(case, model), expected, "the model without the experts", ROUNDING)
    check_reload(case, model)
    return f"not compared with masked experts: the router of {min(missed)} is no Linear" if missed else None


def _chosen(case: Case) -> dict[str, list[int]]:
    """The experts that are removed by their use on the batches."""
    model = case.build()
    how: dict[str, Any] = {"batches": batches_for(case, model), "layers_path": case.stack}
    try:
        report = drop_experts(model, 0.25, **how)
    except ValueError as error:  # of experts in groups, one of each is removed
        if not str(error).startswith("share: expected at least"):
            raise
        report = drop_experts(model, 0.5, **how)
    found: dict[str, list[int]] = report.results["removed_experts"]
    return found


@contextmanager
def _masked(case: Case, model: Any, removed: Mapping[str, Sequence[int]]) -> Iterator[set[str]]:
    """Within the block routers give these experts -inf; at its end, the set has the routers that did not run so."""
    stack = find_decoder_layers(model, case.stack)
    sets = {one.name: one for index in range(len(stack)) for one in stack.expert_sets(index)}
    routers = {name: sets[name].router for name in removed}
    weights = {getattr(router.module, router.key).data_ptr(): name for name, router in routers.items()}
    corrections = {name: _correction(router.module) for name, router in routers.items()}
    biases = {name: bias for name, bias in corrections.items() if bias is not None}
    before = {name: bias.clone() for name, bias in biases.items()}
    missed, linear = {*removed}, F.linear

    def with_mask(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        name = weights.get(weight.data_ptr())
        if name is not None:
            missed.discard(name)
            out = out.clone()
            out[..., [*removed[name]]] = -torch.inf
        return out

    F.linear = with_mask
    for name in before:
        biases[name].data[..., [*removed[name]]] = -torch.inf
    try:
        yield missed
    finally:
        F.linear = linear
        for name, bias in before.items():
            biases[name].data.copy_(bias)


def _correction(router: torch.nn.Module) -> Tensor | None:
    """What a router adds to its scores before it chooses, in itself or in a part of it."""
    tensors = itertools.chain(router.named_parameters(), router.named_buffers())
    return next((tensor for name, tensor in tensors if name.endswith("e_score_correction_bias")), None)
