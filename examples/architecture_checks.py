"""What `architectures.py` checks of each function on a model: each check can fail, and says in words what was excluded.

A check takes the kind of model, and returns a note or None. A difference that nobody was told of raises `WrongResult`;
a ValueError of the package is a refusal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from architecture_comparison import ROUNDING, check_reload, outputs_of, require, same, unchanged_if_refused
from architecture_drop import check_drop
from architecture_inputs import batches_for
from architecture_references import (
    check_counted,
    cut_to_ranks,
    generates_alike,
    left_out,
    naive_angles,
    told_weights,
    zeroed_as,
)
from architecture_scores import check_score
from architecture_structure import check_drop_experts, check_pack, check_repeat, has_experts
from architecture_training import check_adapter, check_owlore
from tiny_architectures import Case

from hf_cod import OwlBnbConfig, RankPlan, diagnose, factorize, find_decoder_layers, narrow, prune, quantize


def check_diagnosis(case: Case) -> str | None:
    """Angles against hooks on the layers; the model is left as it was."""
    model = case.build()
    before, intact = copy.deepcopy(model.state_dict()), outputs_of(case, model)
    with unchanged_if_refused(model):
        report = diagnose(model, batches=batches_for(case, model), layers_path=case.stack, show_progress=False)
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, before[name]), f"{name} has changed")
    same(outputs_of(case, model), intact, "the model after the diagnosis", 0)
    for index, expected in enumerate(naive_angles(case, model)):
        got = report.layers["angular_distance"][index]
        alike = got is expected is None or (got is not None and expected is not None and abs(got - expected) < 1e-3)
        require(alike, f"angle of layer {index}: {got}, by hooks {expected}")
    return None


def check_prune(case: Case) -> str | None:
    """Zeros counted = promised; weights counted + those that notes exclude = all of the layers; a reload is equal."""
    return _pruned(case, "wanda")


def check_sparsegpt(case: Case) -> str | None:
    """The same with error compensation."""
    return _pruned(case, "sparsegpt")


def _pruned(case: Case, method: str) -> str | None:
    model = case.build()
    stack = find_decoder_layers(model, case.stack)
    with unchanged_if_refused(model):
        report = prune(model, 0.5, method, batches=batches_for(case, model), layers_path=case.stack)
    matrices = [weight for index in range(len(stack)) for _, weight in stack.matrices(index)]
    counted = sum(W.numel() for W in matrices)
    share = sum(int((W == 0).sum()) for W in matrices) / counted
    require(abs(share - 0.5) < 0.02, f"{share:.3f} of the weights are 0 instead of 0.5")
    require(abs(share - report.results["sparsity"]) < 1e-6, f"{share} of the weights are 0, and the report differs")
    require(sum(report.layers["parameters"]) == counted, f"the report counts other weights than the {counted:,}")
    require(bool(outputs_of(case, model).isfinite().all()), "the outputs are not finite")
    check_reload(case, model)
    return check_counted(stack, counted, report.notes, "pruned")


def check_quantize(case: Case) -> str | None:
    """Quantized = its own `dequantize()`; weights quantized + excluded = all of the layers; a reload is equal."""
    return _quantized(case, None)


def check_compensated(case: Case) -> str | None:
    """The same with error compensation; less than a tenth of the energy of each matrix's outputs is lost."""
    return _quantized(case, batches_for(case, case.build()))


def _quantized(case: Case, batches: Any) -> str | None:
    model = case.build()
    stack = find_decoder_layers(model, case.stack)
    sizes = {name: W.numel() for index in range(len(stack)) for name, W in stack.matrices(index)}
    counted = sum(sizes.values())
    with unchanged_if_refused(model):
        report = quantize(model, OwlBnbConfig(bits=4), batches=batches, layers_path=case.stack)
    check_reload(case, model)
    quantized = outputs_of(case, model)
    require(bool(quantized.isfinite().all()), "the outputs are not finite")
    dense: Any = copy.deepcopy(model).dequantize()
    same(quantized, outputs_of(case, dense), "dequantize()", 2e-2)
    done, told = sum(sizes[name] for name in report.results["module_bits"]), told_weights(report.notes, sizes)
    require(done + told == counted, f"{done:,} weights quantized, {told:,} excluded, {counted:,}")
    lost = [error for error in report.layers.get("error", []) if error is not None]
    require(bool(lost) == bool(batches), "no error is reported" if batches else "an error is reported without batches")
    require(all(0 <= error < 0.1 for error in lost), f"{lost} of the energy of outputs are lost")  # NaN is not
    left = left_out(report.notes, "quantized")
    check_counted(find_decoder_layers(dense, case.stack), counted, report.notes, "quantized")
    return _first_of(left)


def check_factorize(case: Case) -> str | None:
    """Factorized at the rank that matrices have = intact; a reload is equal."""
    return _factorized(case, "plain", 1e-4)


def check_whitened(case: Case) -> str | None:
    """The same, with the least error of the outputs on the batches."""
    return _factorized(case, "whitened", 1e-3)


def _factorized(case: Case, method: str, tolerance: float) -> str | None:
    model = case.build()
    batches = batches_for(case, model) if method == "whitened" else None
    stack = find_decoder_layers(model, case.stack)
    matrices = [name for index in range(len(stack)) for name in stack.input_shapes(index)]
    ranks = factorize(case.build(), 0.9, "plain", layers_path=case.stack).results["ranks"]
    cut_to_ranks(model, ranks)
    intact = outputs_of(case, model)
    with unchanged_if_refused(model):
        plan = RankPlan("rank", 0.5, ranks, "given")
        report = factorize(model, plan, method, batches=batches, layers_path=case.stack)
    require(report.results["ranks"] == ranks, "ranks differ from the plan")
    for name, rank in ranks.items():
        thin = sorted(min(p.shape[-2:]) for p in model.get_submodule(name).parameters() if p.dim() in (2, 3))
        require(thin == [rank, rank], f"{name} has factors of ranks {thin} instead of {rank}")
    same(outputs_of(case, model), intact, "the model of this rank", tolerance)
    check_reload(case, model)
    left = len(matrices) - len(ranks)
    return f"{left} of {len(matrices)} matrices have no factors" if left else None


def check_narrow(case: Case) -> str | None:
    """Fewer heads and channels = zeroed ones; a reload is equal; generation with a cache = without."""
    model = case.build()
    size = sum(p.numel() for p in model.parameters())
    batches = batches_for(case, model)
    with unchanged_if_refused(model):
        narrow(model, 0.85, "magnitude", "none", batches=batches, channel_multiple=8, layers_path=case.stack)
    require(sum(p.numel() for p in model.parameters()) < size, "no weight was removed")
    zeroed = outputs_of(case, zeroed_as(model, case.build()))
    same(outputs_of(case, model), zeroed, "the model with zeros", ROUNDING)
    model = case.build()
    with unchanged_if_refused(model):
        report = narrow(model, 0.85, "fluctuation", batches=batches, channel_multiple=8, layers_path=case.stack)
    check_reload(case, model)
    generates_alike(case, model)
    return _first_of(left_out(report.notes, "narrowed"))


# Column of the table -> check.
CHECKS: dict[str, Callable[[Case], str | None]] = {
    "diagnose": check_diagnosis,
    "prune": check_prune,
    "sparsegpt": check_sparsegpt,
    "drop": check_drop,
    "quantize": check_quantize,
    "compensated": check_compensated,
    "factorize": check_factorize,
    "whitened": check_whitened,
    "narrow": check_narrow,
    "owlore": check_owlore,
    "adapter": check_adapter,
    "score": check_score,
    "pack": check_pack,
    "repeat": check_repeat,
    "drop-experts": check_drop_experts,
}
# Of a stack that is chosen by name: training has no such choice.
TRAINING = ("owlore", "adapter")


def checks_of(case: Case) -> list[str]:
    """The checks of a kind of model; removed experts are those of mixtures alone."""
    left_out = {*(TRAINING if case.stack is not None else ()), *(() if has_experts(case) else ("drop-experts",))}
    return [check for check in CHECKS if check not in left_out]


def _first_of(notes: list[str]) -> str | None:
    return f"{len(notes)} note{'s' if len(notes) > 1 else ''}, such as: {notes[0]}" if notes else None
