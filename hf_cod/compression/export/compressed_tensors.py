"""A checkpoint in the format of compressed-tensors, "pack-quantized", which vLLM and transformers run.

The matrices are rounded in place, so that the model computes what the checkpoint does. The config has a group for each
width, whose regular expressions match each matrix once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.compression.export.plan import ExportPlan
from hf_cod.compression.export.request import Request, Written, by_width
from hf_cod.compression.export.uniform import PACKED, SCALE, SHAPE, decode, round_uniform
from hf_cod.functional.products import output_energy
from hf_cod.layers.checks import check_writable
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.layer_notes import NamedErrors, check_errors
from hf_cod.layers.sequential import Sums, change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers

# vLLM runs these widths since June 2026.
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
UNCALIBRATED = (
    "no calibration dataset: rounding is to nearest, without error compensation, which costs much quality at 3 bits"
)


def write(request: Request) -> Written:
    """Rounds the matrices and saves the checkpoint.

    Raises:
        ValueError: weights that cannot be replaced, NaN or infinity.
    """
    stack, plan = request.stack, request.plan
    model: Any = stack.model
    check_writable(stack)
    use = check_unwritten(model, request.batches)
    targets = targets_of(stack, plan)
    change = _LayerChange(stack, plan, request)
    work = fingerprint_of_work(request.journal, model, request.batches, plan.widths, plan.group, change.digests)
    calibrated = request.batches is not None
    finished = FinishedLayers(request.journal, work, change.tensors_of, change.put_back, change.check_note)
    title = f"quantizing to {plan.bits():.2f} bits"
    passes: list[str] = []
    if request.batches is not None:
        passes = change_sequentially(
            stack, request.batches, ProductsRecorder, change, finished, title, request.show_progress
        )
    else:
        change_each(stack, change, finished, title, request.show_progress)
    _save(request, change.packed, entry(plan, targets))
    notes: list[dict[str, Any]] = [finished.notes[index] for index in range(len(stack))]
    return Written(
        ["vllm serve DIRECTORY runs the checkpoint; from_pretrained loads it if compressed-tensors is installed."],
        [
            *([] if calibrated or request.statistics is not None else [UNCALIBRATED]),
            *use.notes_on(stack),
            *passes,
            *(f"no token entered {name}: rounded to nearest" for note in notes for name in note["unseen"]),
        ],
        {name: error for note in notes for name, error in note["errors"].items()},
    )


def entry(plan: ExportPlan, targets: Mapping[int, list[str]]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    groups = {}
    for number, (width, names) in enumerate(targets.items()):
        weights = {
            "num_bits": width,
            "type": "int",
            "strategy": "group",
            "group_size": plan.group,
            "symmetric": True,
            "dynamic": False,
            "observer": "minmax",
        }
        groups[f"group_{number}"] = {
            "targets": names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def targets_of(stack: DecoderLayers, plan: ExportPlan) -> dict[int, list[str]]:
    """Width -> regular expressions of `targets`, one for matrices of the same name in several layers.

    The beginning of the layers' name is left out, as it depends on the class that loads the checkpoint ("model.layers",
    "layers"), unless other modules would match, too.
    """
    inside = stack.layers_path.removeprefix(f"{stack.model.base_model_prefix}.")
    for prefix in (rf"(.*\.)?{re.escape(inside)}", re.escape(stack.layers_path)):
        found = {width: _expressions(stack, plan, names, prefix) for width, names in by_width(plan.widths).items()}
        if _matched(stack, found) == {name: [width] for name, width in plan.widths.items()}:
            return found
    raise AssertionError(f"{stack.layers_path}: full names match each matrix once")


def _expressions(stack: DecoderLayers, plan: ExportPlan, names: list[str], prefix: str) -> list[str]:
    layers: dict[str, list[int]] = {}
    for name in names:
        index = plan.layers[name]
        layers.setdefault(name.removeprefix(f"{stack.layers_path}.{index}."), []).append(index)
    places: dict[tuple[int, ...], list[str]] = {}
    for rest, indices in layers.items():
        places.setdefault(tuple(indices), []).append(re.escape(rest))
    return [rf"re:{prefix}\.({'|'.join(map(str, indices))})\.({'|'.join(rests)})$" for indices, rests in places.items()]


def _matched(stack: DecoderLayers, targets: Mapping[int, list[str]]) -> dict[str, list[int]]:
    """Module -> the widths whose expressions match its name."""
    found: dict[str, list[int]] = {}
    for name, _ in stack.model.named_modules():
        for width, names in targets.items():
            hits = [target for target in names if re.match(target.removeprefix("re:"), name)]
            found.setdefault(name, []).extend([width] * len(hits))
    return {name: widths for name, widths in found.items() if widths}


class _LayerChange:
    """Rounds the matrices of one layer in place, and keeps their packed tensors."""

    def __init__(self, stack: DecoderLayers, plan: ExportPlan, request: Request) -> None:
        assert plan.group is not None
        self._stack, self._plan, self._group = stack, plan, plan.group
        self._measured = request.batches is not None
        self._statistics = None if self._measured else request.statistics
        self._names = [[n for n in plan.widths if plan.layers[n] == index] for index in range(len(stack))]
        self.packed: dict[str, dict[str, Tensor]] = {}
        self.digests = {} if self._statistics is None else self._statistics.digests()

    @torch.no_grad()
    def __call__(self, index: int, sums: Sums | None) -> dict[str, Any]:
        """Returns {"unseen": matrices that no token entered, "errors": name -> share of energy lost}."""
        unseen: list[str] = []
        errors: dict[str, float] = {}
        for name in self._names[index]:
            W: Tensor = self._stack.model.get_submodule(name).weight  # type: ignore[assignment]
            products = None if sums is None else sums.of(name)
            squares = None if self._statistics is None else self._statistics.of(name)
            known = sums is not None or self._statistics is not None
            if known and products is None and squares is None:
                unseen.append(name)
            tensors = round_uniform(W, self._plan.widths[name], self._group, name, squares, products)
            if products is not None:
                errors[name] = _lost(W, self._decoded(name, tensors), products)
            self._put(name, tensors)
        return {"unseen": unseen, "errors": errors}

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """The packed tensors of a layer."""
        return {f"{name}/{key}": t for name in self._names[index] for key, t in self.packed[name].items()}

    @torch.no_grad()
    def put_back(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Rounds an intact layer to these tensors."""
        for name in self._names[index]:
            self._put(name, {key: tensors[f"{name}/{key}"] for key in (PACKED, SCALE, SHAPE)})

    def check_note(self, index: int, note: Any) -> None:
        """Checks a note of a finished layer."""
        check_errors(note, NamedErrors, self._names[index], self._measured)

    def _put(self, name: str, tensors: dict[str, Tensor]) -> None:
        weight: Tensor = self._stack.model.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(self._decoded(name, tensors))
        self.packed[name] = {key: tensor.cpu() for key, tensor in tensors.items()}

    def _decoded(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        return decode(tensors, self._plan.widths[name], self._group)


def _lost(W: Tensor, Q: Tensor, products: Tensor) -> float:
    """|| X (W - Q)^T ||_F^2 / || X W^T ||_F^2."""
    W = W.to(products.dtype)
    whole = output_energy(W, products)
    return output_energy(W - Q.to(products), products) / whole if whole > 0 else 0.0


def _save(request: Request, packed: Mapping[str, dict[str, Tensor]], config: dict[str, Any]) -> None:
    """Saves the model with packed tensors in the place of its matrices; the model itself stays a dense one."""
    model: Any = request.stack.model
    state = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    state |= {f"{name}.{key}": tensor for name, tensors in packed.items() for key, tensor in tensors.items()}
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config
    try:
        model.save_pretrained(request.output, state_dict=state)
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before
