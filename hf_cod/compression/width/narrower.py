"""`narrow`: removes attention heads and MLP channels of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.input_products import MomentsRecorder
from hf_cod.compression.width.experts import cut_experts
from hf_cod.compression.width.gradients import Importance, measure_taylor
from hf_cod.compression.width.matrices import cut
from hf_cod.compression.width.methods import METHODS, needs_inputs
from hf_cod.compression.width.planning import check_units, plan_of_units, without_excluded
from hf_cod.compression.width.selection import Selection
from hf_cod.compression.width.settings import NarrowFields, NarrowSettings
from hf_cod.compression.width.stock_config import layer_overrides, set_stock_config
from hf_cod.compression.width.width_plan import WidthPlan, kept_units
from hf_cod.compression.width.width_report import WidthReporter
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import check_reshapeable, check_sizes
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.expert_units import ExpertUnits, set_sizes, tensors_of
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.independence import check_independent
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_notes import ListedErrors, check_errors
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.module_choice import choose_modules, other_stacks
from hf_cod.layers.own_changes import undoing_own_changes
from hf_cod.layers.sequential import Sums, change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.unit_discovery import find_all_units
from hf_cod.layers.units import Changes, LayerUnits, Units
from hf_cod.models.shaping import record_shapes
from hf_cod.scoring.allocation import LayerAllocation


@renamed(path="layers_path", multiple="channel_multiple")
@for_one_thread
@undoing_own_changes
@checked
def narrow(
    model: nn.Module,
    plan: LayerAllocation | WidthPlan | float,
    method: str | None = None,
    compensation: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    settings: NarrowSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[NarrowFields],
) -> RunReport:
    """Removes the attention heads and MLP channels of least importance, in place.

    | method | importance of a head group or channel | requires |
    |---|---|---|
    | fluctuation | variance of its outputs, times the norms of its columns (FLAP, arXiv 2312.11983) | batches |
    | taylor | first-order change of the loss without it (LLM-Pruner, arXiv 2305.11627) | batches, a head |
    | magnitude | norm of its weights | nothing |

    | compensation | error compensation by the kept heads and channels | requires |
    |---|---|---|
    | least_squares | their columns are fitted to the outputs, X_k W'^T near X W^T | batches |
    | bias | the mean of the removed outputs is added to the bias (FLAP) | batches |
    | none | none | nothing |

    A key and value head is removed with all query heads that read it. With a method or compensation that requires the
    layers' inputs, layers are changed one after another; the calibration inputs of a layer are the outputs of the
    changed layers before it. Heads and channels of one layer are measured together. Which rows and columns belong to a
    head or channel is measured on a copy of a layer with random weights (`layers/unit_discovery.py`). Before any weight
    changes, the copy with fewer units is compared with the copy with zeroed ones; where they differ (positions by
    head, recurrent layers), the part is left unchanged, and the report's notes say why. The other parts of the layer
    then meet its share alone. All experts of a layer keep equally many channels, a multiple of 8; each chooses its own
    by the inputs of its own tokens.

    If all layers have the same width and the family's config can describe it, the result is a stock model. Otherwise,
    the model and its config get a subclass of their classes (`models/shaping.py`), and loading requires this package or
    trust_remote_code. In both cases save_pretrained, from_pretrained, generate, device_map and PEFT work.

    The report's `layers` hold `parameter_share` (share of the layer's weights that is kept), `share_of_heads`,
    `share_of_channels` and `share_of_expert_channels` (kept shares; None where the structure is not known), `error`
    (lost share of the energy of the cut matrices' outputs, mean over these matrices; only if inputs were required) and
    `parameters` (of the intact layer); its `results` hold `parameter_share` of all layers, `parameters` of the full
    model before and after, the numbers of `heads`, `channels` and `expert_channels` by layer, and whether the model is
    `stock`.

    Args:
        model: a transformers model with plain weights. After an interruption (NaN or infinity, out of memory, Ctrl-C)
            the finished layers are narrowed, the others are not. Such a model runs and can be saved; to start again or
            to resume from a journal, load the original model again.
        plan: an allocation of "parameter_share"; widths by layer; or one share of parameters for all layers.
        method: see the first table; default: fluctuation.
        compensation: see the second table; default: least_squares.
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
        settings: how heads and channels are selected, and the error compensation.
        **fields: or fields of `NarrowSettings` by name: `channel_multiple`; numbers of channels are rounded to
            multiples of it, as close to the budget as possible (default: 32, for experts of fewer than 512 channels
            8); `include` and `exclude`, the matrices that may be cut,
            as PEFT's target_modules and exclude_modules (heads or channels are removed only if all their matrices may
            be cut; the budget is that of all matrices); for texts, also fields of `SampleSettings`: sequence_length,
            max_samples, batch_size, pack, seed.

    Raises:
        ValueError: an unknown method or compensation, a plan for another model or out of range (says the least
            possible), a number of heads that splits a group, missing batches, no heads or channels of a known
            structure, weights that cannot be replaced (adapters, quantized, offloaded, shared, factorized), a model
            class of neither transformers nor hf_cod, a model that changes its weights in eval mode for good, NaN or
            infinity in gradients; in these cases the model is left unchanged. NaN or infinity in weights or activations
            (says where): see `model`.
    """
    how = resolve(narrow, NarrowSettings, settings, fields, method=method, compensation=compensation)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    work: dict[str, Any] = {
        "journal": journal,
        "layers_path": layers_path,
        "name": name,
        "show_progress": show_progress,
    }
    return narrow_units(model, None, plan, how, batches, **work)


@for_one_thread
@undoing_own_changes
def narrow_units(
    model: nn.Module,
    units: Sequence[LayerUnits] | None,
    plan: LayerAllocation | WidthPlan | float,
    how: NarrowSettings,
    batches: Batches | None,
    *,
    journal: str | Path | None,
    layers_path: str | None,
    name: str | None,
    show_progress: bool,
) -> RunReport:
    """`narrow` with heads and channels that were found before, in this model or an equal one.

    Args:
        model, plan, batches, journal, layers_path, name, show_progress: see `narrow`.
        units: of each layer, as `find_all_units` returns them; None: they are searched for.
        how: settings.

    Raises:
        ValueError: see `narrow`.
    """
    method, compensation = how.method, how.compensation
    stack = find_decoder_layers(model, layers_path)
    sequential = needs_inputs(method, compensation)
    if sequential or METHODS[method].gradients:
        check_needed(batches, f"for {method} with {compensation}")
    if batches:
        check_inputs(stack.model, batches)
    check_reshapeable(stack, "narrow")
    check_unwritten(stack.model, batches)
    check_independent(stack, "narrow", batches)
    choice = choose_modules(stack, how)
    units = without_excluded(find_all_units(stack, batches) if units is None else units, choice)
    chosen = _plan(stack, units, plan, how.channel_multiple)
    kept = kept_units(units, chosen)
    described = WidthReporter(stack, units, name, [*choice.notes("narrowed"), *other_stacks(stack, "narrowed")])
    work = fingerprint_of_work(journal, stack.model, batches, method, compensation, kept, *choice.identity)
    taylor: Importance = {}
    if METHODS[method].gradients and batches:
        taylor = measure_taylor(stack, units, batches, show_progress)
    change = LayerChange(stack, units, kept, method, compensation, taylor)
    check_note = partial(change.check_note, measured=bool(sequential and batches))
    finished = FinishedLayers(journal, work, change.tensors_of, change.put_back, check_note)
    told: dict[str, Any] = {"method": method, "compensation": compensation, **choice.given}
    told["plan"] = f"parameter_share {chosen.budget:g} by {chosen.method}"
    told |= describe_batches(batches) if batches and (sequential or taylor) else {}
    try:
        if sequential and batches:
            recorder, bar = partial(MomentsRecorder, names=change.writers), "narrowing"
            described.notes += change_sequentially(stack, batches, recorder, change, finished, bar, show_progress)
        else:
            change_each(stack, change, finished, "narrowing", show_progress)
    finally:
        stock = not change.done or set_stock_config(stack, units, kept)
        if not stock:  # also after an error: otherwise the changed model could not be loaded after saving
            overrides = layer_overrides(stack, units, kept)
            record_shapes(stack.model, change.done, overrides)
    return described.report(chosen, kept, finished, told, stock)


class LayerChange:
    """Narrows one layer, and provides what `FinishedLayers` requires to save and to repeat that.

    Args:
        stack: the layers.
        units: of each layer.
        kept: of each layer: kind -> number of kept units, for the kinds of which some are removed.
        method, compensation: see `narrow`.
        taylor: importance from gradients, measured beforehand.
    """

    def __init__(
        self,
        stack: DecoderLayers,
        units: Sequence[LayerUnits],
        kept: Sequence[dict[str, int]],
        method: str,
        compensation: str,
        taylor: Importance,
    ) -> None:
        self._stack, self._kept = stack, kept
        self._cut = [[own for own in layer.found if own.kind in less] for layer, less in zip(units, kept, strict=True)]
        self._select = Selection(method, compensation, taylor)
        self.writers = [name for layer in self._cut for own in layer for name in _writers(own)]
        self.done: Changes = {}

    @torch.no_grad()
    def __call__(self, index: int, sums: Sums | None) -> dict[str, Any]:
        """Returns {"errors": lost share of the energy of each cut matrix's outputs, "unseen": matrices that no token
        entered, whose units were chosen by magnitude, without error compensation}.
        """
        weights = dict(self._stack.matrices(index))
        errors: list[float] = []
        unseen: list[str] = []
        for own in self._cut[index]:
            number = self._kept[index][own.kind]
            if isinstance(own, ExpertUnits):
                changes, error, missing = cut_experts(self._stack, own, number, sums, self._select)
                unseen += missing
            else:
                M = None if sums is None else sums.of(own.writer)
                unseen += [own.writer] if sums is not None and M is None else []
                kept = self._select(weights, own, number, M, unseen=sums is not None and M is None)
                changes, error = cut(self._stack, own, kept.units, kept.W, kept.bias), kept.error
            errors += [] if error is None else [error]
            self._note(changes)
        return {"errors": errors, "unseen": unseen}

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """The cut matrices of a layer, and their biases."""
        found = [tensors_of(self._stack.model, own) for own in self._cut[index]]
        return {key: tensor for tensors in found for key, tensor in tensors.items()}

    def put_back(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Sets the matrices of an intact layer to these tensors."""
        for own in self._cut[index]:
            self._note(set_sizes(self._stack.model, own, self._kept[index][own.kind], tensors))

    def check_note(self, index: int, note: Any, measured: bool) -> None:
        """Checks a note of a layer that was finished with batches (`measured`) or without."""
        check_errors(note, ListedErrors, [own.writer for own in self._cut[index]], measured)

    def _note(self, changes: Changes) -> None:
        for name, sizes in changes.items():
            self.done[name] = {**self.done.get(name, {}), **sizes}


def _writers(own: Units) -> list[str]:
    """Names of the matrices whose inputs are summed."""
    return own.linears.get(own.writer, [own.writer]) if isinstance(own, ExpertUnits) else [own.writer]


def _plan(
    stack: DecoderLayers, units: list[LayerUnits], plan: LayerAllocation | WidthPlan | float, channel_multiple: int
) -> WidthPlan:
    if not isinstance(plan, WidthPlan):
        return plan_of_units(stack, units, plan, channel_multiple)
    check_units(stack, units)
    check_sizes("plan", plan.model, plan.sizes, stack)
    return plan
