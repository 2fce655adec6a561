"""`quantize`: stores a loaded model's matrices in three and four bits, layer by layer, with error compensation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.compression.quantization.config import METHOD, OwlBnbConfig, QuantizeFields, score_of
from hf_cod.compression.quantization.factor_inputs import inputs_of
from hf_cod.compression.quantization.plan import BitPlan, plan_by, recorded, what_is_lost
from hf_cod.compression.quantization.quantizer import OwlBnbQuantizer
from hf_cod.compression.quantization.rounding import Rounding, fill, new_experts, new_module
from hf_cod.compression.quantization.widths import stored_bits
from hf_cod.functional.damping import LEAST_TOKENS
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport, environment
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of
from hf_cod.layers.checks import check_writable, name_of
from hf_cod.layers.devices import execution_device
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_notes import NamedErrors, check_errors, check_unseen
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.module_choice import choose_modules, other_notes
from hf_cod.layers.own_changes import undoing_own_changes
from hf_cod.layers.replacement_modules import replace as replace_module
from hf_cod.layers.sensitive_modules import left_notes
from hf_cod.layers.sequential import change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.weights import weight_of
from hf_cod.models.own_config import own_config
from hf_cod.scoring.search_results import with_search


@renamed(path="layers_path")
@for_one_thread
@undoing_own_changes
@checked
def quantize(
    model: PreTrainedModel,
    config: OwlBnbConfig | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    samples: SampleSettings | None = None,
    **fields: Unpack[QuantizeFields],
) -> RunReport:
    """Stores the matrices of a model's layers in three or four bits, in place; all other weights are left unchanged.

    | given | scales | codes |
    |---|---|---|
    | nothing | the largest magnitude of each block | nearest |
    | `config.statistics` | least error, weighted by ||X_j||_2^2 | nearest |
    | `batches` | the same | nearest, with error compensation (GPTQ, arXiv 2210.17323) |

    With batches, layers are quantized one after another; the calibration inputs of a layer are the outputs of the
    quantized layers before it. In addition to the model, memory holds one layer's sums and the hidden states of the
    batches (on the CPU). All three cases have the same storage format and speed. Factors of banks of experts are
    matrices of their own. `save_pretrained` writes the quantized model, `from_pretrained` reads it where hf_cod is
    imported, and `model.dequantize()` makes it dense again.

    The report's `layers` hold `bits` (stored, scales included), `error` (share of the outputs' energy that is lost by
    rounding, mean over the layer's matrices; with batches) and `parameters`; its `results` hold `bits` of all quantized
    matrices together, `planned_bytes` of them, and `module_bits` (name -> 3 or 4, or a
    digit for each expert of a bank).

    Args:
        model: a transformers model with plain weights in memory.
        config: bits, scores, storage; if its `modules` are set, they replace bits and scores.
        batches: dicts for the model's forward; `token_batches` makes them from texts. attention_mask (S, T) marks
            padding, which is ignored.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which each finished layer is saved; the same call on the same intact model resumes from
            it. The files are not removed.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        **fields: or fields of `OwlBnbConfig` by name: bits, scores, allocation, statistics, include, exclude, ...;
            for texts, also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: bits out of range (says the least and the most), scores or statistics of another model, both
            statistics and batches, weights that cannot be replaced (adapters, quantized, offloaded, shared), NaN or
            infinity in weights or activations (says where), a model that changes its weights in eval mode for good.
    """
    import hf_cod.compression.quantization.bnb  # noqa: F401 - fails before any work if bitsandbytes is missing

    config = resolve(quantize, OwlBnbConfig, config, fields)
    if getattr(model, "is_quantized", False):
        raise ValueError("model: expected dense weights, got quantized ones; call model.dequantize() first")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers model without wrappers, got {type(model).__name__}")
    stack = find_decoder_layers(model, layers_path)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    statistics = config.statistics
    if statistics is not None and batches is not None:
        raise ValueError("statistics: expected batches or statistics, got both")
    if statistics is not None:
        statistics.check(stack)
    if batches is not None:
        check_inputs(stack.model, batches)
    choice = choose_modules(stack, config)
    stack = choice.stack
    check_writable(stack, in_files=True, factors=True)
    use = check_unwritten(stack.model, batches)
    plan = plan_by(stack, config)
    change = _LayerChange(stack, plan, config)
    sums = {} if statistics is None else statistics.digests()
    # The bits name the chosen matrices.
    work = fingerprint_of_work(journal, model, batches, plan.bits, config.block, config.double_quant, sums)
    check_note = partial(change.check_note, measured=batches is not None)
    finished = FinishedLayers(journal, work, change.tensors_of, change.put_back, check_note)
    title = name or name_of(stack)
    bar = f"quantizing to {plan.stored:.2f} bits"
    if batches is not None:
        passes = change_sequentially(stack, batches, ProductsRecorder, change, finished, bar, show_progress)
    else:
        passes = []
        change_each(stack, change, finished, bar, show_progress)
    _mark(model, recorded(config, plan))
    told = {**choice.given, **({} if batches is None else describe_batches(batches))}
    left = [*choice.notes("quantized"), *other_notes(stack, "quantized")]
    notes = [*what_is_lost(config, plan, batches is not None), *use.notes_on(stack), *passes, *left]
    searched = config.allocation.search if config.allocation else {}
    return with_search(_report(stack, plan, config, finished, title, told, notes), searched)


class LayerNote(NamedErrors, total=False):
    """A layer's note. Notes of earlier versions have no `few`.

    Attributes:
        few: "name of a matrix.expert" of each expert whose tokens were too few for error compensation.
    """

    few: list[str]


class _LayerChange:
    """Replaces the matrices of one layer, and provides what `FinishedLayers` requires to save and to repeat that."""

    def __init__(self, stack: DecoderLayers, plan: BitPlan, config: OwlBnbConfig) -> None:
        self._stack, self._plan, self._config = stack, plan, config
        self._names = [plan.names(stack, index) for index in range(len(stack))]
        found = [matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)]
        self._banked = {part.name: part for matrix in found for part in matrix.parts()}

    @torch.no_grad()
    def __call__(self, index: int, sums: Any) -> LayerNote:
        """Returns {"unseen": matrices that no token entered, "errors": name -> share of energy lost, "few": ...}."""
        note = LayerNote(unseen=[], errors={}, few=[])
        linears = self._stack.linears(index)
        for name in self._names[index]:
            bank, known = self._banked.get(name), (self._config.statistics, sums)
            given = known if bank is None else [inputs_of(bank, each) for each in known]
            rounding = Rounding(name, self._plan.widths(name), self._config, *given)
            W = weight_of(linears[name]) if bank is None else bank.weights()
            tensors = rounding.of_matrix(W, None) if bank is None else rounding.of_experts(W)
            self._exchange(name, tensors)
            note["unseen"] += rounding.unseen
            note["few"] += rounding.few
            if sums is not None and name not in rounding.unseen:
                note["errors"][name] = rounding.lost / rounding.energy if rounding.energy > 0 else 0.0
        return note

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """The codes and scales of a layer."""
        found: dict[str, Tensor] = {}
        for name in self._names[index]:
            state = self._stack.model.get_submodule(name).state_dict()
            found |= {f"{name}/{key}": tensor for key, tensor in state.items() if key != "bias"}
        return found

    def put_back(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Replaces the matrices of an intact layer by these tensors."""
        for name in self._names[index]:
            found = {key.split("/", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
            self._exchange(name, found)

    def check_note(self, index: int, note: Any, measured: bool) -> None:
        """Checks a note of a layer that was finished with batches (`measured`) or without."""
        check_errors(note, LayerNote, self._names[index], measured)
        check_unseen(note.get("few", []), self._names[index], measured)

    def _exchange(self, name: str, tensors: dict[str, Tensor]) -> None:
        bits, config = self._plan.bits[name], self._config
        if name in self._banked:
            before = self._banked[name].parameter
            module: Any = new_experts(self._banked[name], bits, config, config.compute_dtype)
        else:
            linear: Any = self._stack.model.get_submodule(name)
            before, module = linear.weight, new_module(linear, int(bits), config, config.compute_dtype)
        fill(module, {key: tensor.to(before.device) for key, tensor in tensors.items()})
        replace_module(self._stack.model, name, module)


def _mark(model: Any, config: OwlBnbConfig) -> None:
    """Sets the attributes that from_pretrained sets: saving, PEFT and Trainer recognize the model as quantized."""
    own_config(model)
    quantizer = OwlBnbQuantizer(config, pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    quantizer.postprocess_model(model, loaded=False)


def _report(
    stack: DecoderLayers,
    plan: BitPlan,
    config: OwlBnbConfig,
    finished: FinishedLayers,
    title: str,
    told: dict[str, Any],
    remarks: list[str],
) -> RunReport:
    notes: list[Any] = [finished.notes[index] for index in range(len(stack))]
    layers = layer_table(stack, plan, config)
    if any(note["errors"] for note in notes):
        layers["error"] = [_mean(note["errors"].values()) for note in notes]
    weights = plan.weights
    model: nn.Module = stack.model
    by_expert = {} if config.expert_scores is None else {"expert_score": config.expert_scores.method}
    return RunReport(
        kind="quantize",
        model=title,
        settings={
            "block": config.block,
            "double_quant": config.double_quant,
            "score": score_of(config),
            **told,
            **by_expert,
        },
        environment=environment(execution_device(model), next(_floating(model)).dtype),
        layers=layers,
        results={"bits": plan.stored, "planned_bytes": round(plan.stored * weights / 8), "module_bits": plan.bits},
        summary=[
            f"{weights:,} weights of the layers' matrices are stored in {plan.stored:.3f} bits each, scales included."
        ],
        notes=[
            *remarks,
            *(f"no token entered {name}: rounded to nearest" for note in notes for name in note["unseen"]),
            *_few([name for note in notes for name in note.get("few", [])]),
            *left_notes(stack, plan.left),
        ],
    )


def _few(names: list[str]) -> list[str]:
    """A sentence on experts that were rounded without error compensation; none if there are none."""
    if not names:
        return []
    count = "1 matrix" if len(names) == 1 else f"{len(names)} matrices"
    return [
        f"{count} of experts rounded to nearest with weighted scales, because fewer tokens entered them than "
        f"1/{1 / LEAST_TOKENS:g} of their input channels: {', '.join(names)}"
    ]


def layer_table(stack: DecoderLayers, plan: BitPlan, config: OwlBnbConfig) -> dict[str, list[Any]]:
    """Values of each layer: stored bits a weight, number of matrices with four bits (those of each expert), weights,
    and the score.
    """
    table: dict[str, list[Any]] = {"bits": [], "four": [], "parameters": []}
    for index in range(len(stack)):
        names = plan.names(stack, index)
        weights = sum(math.prod(plan.sizes[name]) for name in names)
        total = sum(stored_bits(plan.sizes[name], plan.bits[name], config) for name in names)
        table["bits"].append(total / weights if weights else None)
        table["four"].append(sum(plan.widths(name).count(4) for name in names))
        table["parameters"].append(weights)
    scores = config.scores
    return table if scores is None else {**table, "score": scores.values}


def _floating(model: nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.is_floating_point())


def _mean(values: Any) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
