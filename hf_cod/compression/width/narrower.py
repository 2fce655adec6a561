"""`narrow`: a model with fewer attention heads and MLP channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.input_products import MomentsRecorder
from hf_cod.compression.width.gradients import Importance, measure_taylor
from hf_cod.compression.width.matrices import Changes, cut, put_back, tensors_of
from hf_cod.compression.width.methods import COMPENSATIONS, METHODS, needs_inputs
from hf_cod.compression.width.planning import check_units, plan_of_units
from hf_cod.compression.width.settings import NarrowFields, NarrowSettings
from hf_cod.compression.width.stock_config import set_stock_config
from hf_cod.compression.width.width_plan import WidthPlan, kept_units
from hf_cod.compression.width.width_report import WidthReporter
from hf_cod.functional import channels
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batches, describe_batches
from hf_cod.layers.checks import check_sizes, check_writable
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import check_independent
from hf_cod.layers.sequential import Sums, change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.units import LayerUnits, find_units
from hf_cod.models.shapes import LowRankLinear
from hf_cod.models.shaping import check_shapeable, record_shapes
from hf_cod.scoring.allocation import LayerAllocation


@renamed(path="layers_path", multiple="channel_multiple")
@checked
def narrow(
    model: nn.Module,
    plan: LayerAllocation | WidthPlan | float,
    method: str | None = None,
    compensation: str | None = None,
    *,
    batches: Batches | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    settings: NarrowSettings | None = None,
    **fields: Unpack[NarrowFields],
) -> RunReport:
    """Removes attention heads and MLP channels that matter least, in place.

    | method | a head group or channel matters by | needs |
    |---|---|---|
    | fluctuation | how its outputs vary, times its columns' norms (FLAP, arXiv 2312.11983) | batches |
    | taylor | what the loss would change, to first order (LLM-Pruner, arXiv 2305.11627) | batches, a head |
    | magnitude | the norm of its weights | nothing |

    | compensation | what the others do for those that go | needs |
    |---|---|---|
    | least_squares | their columns are fitted to the outputs, X_k W'^T near X W^T | batches |
    | bias | a bias takes over the mean of what is gone (FLAP) | batches |
    | none | nothing | nothing |

    A key and value head goes with all query heads that read it. Where inputs are needed, layers change one after
    another, each on what the changed layers before it hand on; heads and channels of one layer are measured together.
    What a layer has of another structure (`layer_units.py`: experts, latent attention, norms over all heads) stays
    whole, and the report's notes say so; the layer's share is then met by what can go.

    Layers that come out alike, of a family whose config can say it, leave a stock model; else the model and its config
    get a class beside their own (`models/shaping.py`). Either way save_pretrained, from_pretrained, generate,
    device_map and PEFT work; without this package, the latter kind loads by trust_remote_code.

    The report's `layers` hold `kept` (share of the layer's weights), `share_of_heads` and `share_of_channels` (that are
    kept; None where they stay whole for want of a known structure), where inputs were needed `error` (share of the
    energy of what the cut matrices put out that is lost, mean over them) and `parameters` (of the intact layer);
    its `results` hold `kept` of all layers, `parameters` before and after, of the whole model, the numbers of `heads`
    and `channels` by layer, and whether the model is `stock`.

    Args:
        model: a transformers model with plain weights. What ends the work on the way (NaN or infinity, want of memory,
            Ctrl-C) leaves the layers before it narrow and the others as they were: such a model runs and can be saved,
            but to begin again, or to go on from a journal, load it anew.
        plan: an allocation of "parameter_share"; widths by layer; or one share of parameters for all layers.
        method: see the first table; default: fluctuation.
        compensation: see the second table; default: least_squares.
        batches: dicts for the model's forward; attention_mask (S, T) marks padding, which does not count.
        journal: a directory: finished layers go there as they come, and the same call on the same intact model goes on
            where it stopped. Files stay until you remove them.
        layers_path: the stack's module name where it cannot be found.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        settings: which heads and channels go, and what makes up for them.
        **fields: or fields of `NarrowSettings` by name: `channel_multiple`, one of which numbers of channels are
            rounded to, as near to the budget as that allows.

    Raises:
        ValueError: an unknown method or compensation, a plan for another model or out of reach (says the least
            possible), heads that cannot be split so, batches missing, no heads or channels of a known structure,
            weights that cannot be exchanged (adapters, quantized, offloaded, shared, factorized), a model class of
            neither transformers nor hf_cod, NaN or infinity in gradients: the model is unchanged then. NaN or infinity
            in weights or activations (says where): see `model`.
    """
    how = resolve(narrow, NarrowSettings, settings, fields, method=method, compensation=compensation)
    method, compensation = how.method, how.compensation
    stack = find_decoder_layers(model, layers_path)
    sequential = needs_inputs(method, compensation)
    if (sequential or METHODS[method].gradients) and not batches:
        raise ValueError(f"batches: expected at least one for {method} with {compensation}, got none")
    if batches:
        check_inputs(stack.model, batches)
    _check_model(stack)
    units = [find_units(stack, index) for index in range(len(stack))]
    chosen = _plan(stack, units, plan, how.channel_multiple)
    kept = kept_units(units, chosen)
    described = WidthReporter(stack, units, name)
    work = fingerprint_of_work(journal, stack.model, batches, method, compensation, kept)
    taylor: Importance = {}
    if METHODS[method].gradients and batches:
        taylor = measure_taylor(stack, units, batches, show_progress)
    change = LayerChange(stack, units, kept, method, compensation, taylor)
    finished = FinishedLayers(journal, work, change.tensors_of, change.put_back)
    told: dict[str, Any] = {"method": method, "compensation": compensation}
    told["plan"] = f"parameter_share {chosen.budget:g} by {chosen.method}"
    told |= describe_batches(batches) if batches and (sequential or taylor) else {}
    try:
        if sequential and batches:
            recorder = partial(MomentsRecorder, names=change.writers)
            change_sequentially(stack, batches, recorder, change, finished, "narrowing", show_progress)
        else:
            change_each(stack, change, finished, "narrowing", show_progress)
    finally:
        stock = not change.done or set_stock_config(stack)
        if not stock:  # also after an error: what was changed could not be loaded again otherwise
            record_shapes(stack.model, change.done)
    return described.report(chosen, kept, finished, told, stock)


class LayerChange:
    """Narrows one layer; what `FinishedLayers` needs to keep and to repeat it.

    Args:
        stack: the layers.
        units: of each layer.
        kept: of each layer: kind -> how many stay, of those kinds of which some go.
        method, compensation: see `narrow`.
        taylor: importance that is known before.
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
        self._method, self._compensate, self._taylor = METHODS[method], COMPENSATIONS[compensation], taylor
        self.writers = [own.writer for layer in self._cut for own in layer]
        self.done: Changes = {}

    @torch.no_grad()
    def __call__(self, index: int, sums: Sums | None) -> dict[str, Any]:
        """Returns {"errors": lost share of the energy of each cut matrix's outputs, "unseen": matrices that no token
        entered, whose units were chosen by magnitude and not made up for}.
        """
        weights = dict(self._stack.matrices(index))
        errors, unseen = [], []
        for own in self._cut[index]:
            W = weights[own.writer]
            M = None if sums is None else sums.of(own.writer)
            method, compensate = self._method, self._compensate
            if sums is not None and M is None:
                unseen.append(own.writer)
                method, compensate = METHODS["magnitude"], COMPENSATIONS["none"]
            importance = self._taylor[own.writer] if method.measure is None else method.measure(weights, own, M)
            kept = channels.largest(importance, self._kept[index][own.kind]).to(W.device)
            k = channels.rows_of(kept, own.count, W.shape[1])
            narrower, bias = compensate(W, M, k)
            if M is not None:
                errors.append(channels.lost_energy(W, M, k, narrower, bias))
            self._note(cut(self._stack, own, kept, narrower, bias))
        return {"errors": errors, "unseen": unseen}

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """The cut matrices of a layer, and their biases."""
        return {key: tensor for own in self._cut[index] for key, tensor in tensors_of(self._stack, own).items()}

    def put_back(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Gives an intact layer these matrices."""
        for own in self._cut[index]:
            self._note(put_back(self._stack, own, self._kept[index][own.kind], tensors))

    def _note(self, changes: Changes) -> None:
        for name, sizes in changes.items():
            self.done[name] = {**self.done.get(name, {}), **sizes}


def _check_model(stack: DecoderLayers) -> None:
    check_shapeable(stack.model)
    check_writable(stack)
    check_independent(stack, "narrow")
    before = next((name for name, m in stack.model.named_modules() if isinstance(m, LowRankLinear)), None)
    if before is not None:
        raise ValueError(f"model: expected whole matrices, got factors in {before}; narrow the model it came from")


def _plan(
    stack: DecoderLayers, units: list[LayerUnits], plan: LayerAllocation | WidthPlan | float, channel_multiple: int
) -> WidthPlan:
    if not isinstance(plan, WidthPlan):
        return plan_of_units(stack, units, plan, channel_multiple)
    check_units(stack, units)
    check_sizes("plan", plan.model, plan.sizes, stack)
    return plan
