"""`measure_swap`: the loss of a model with layers of another one: one at a time, from the bottom and from the top."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from hf_cod.analysis.diagnostics.changed_layers import measure_changed_layers
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric, as_loss
from hf_cod.analysis.evaluation.outputs import run_for_metric, task_of_outputs
from hf_cod.io.arguments import checked
from hf_cod.io.journal import Journal
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.settings import SampleFields, SampleSettings
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of
from hf_cod.layers.devices import environment_of, execution_device, to_device
from hf_cod.layers.exchange import config_differences, why_not_exchangeable
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.partial_forward import running_from, running_only
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers


@checked
def measure_swap(
    model: nn.Module,
    donor: nn.Module,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    metric: Any = None,
    output: str | Path | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    donor_name: str | None = None,
    show_progress: bool = False,
    samples: SampleSettings | None = None,
    **fields: Unpack[SampleFields],
) -> RunReport:
    """The loss of a model in which layers of another one run, such as of a base model and its fine-tuned version.

    With f_l the layers of the model and g_l those of the donor, L of each, and embeddings and head of the model:

        swap_single[l]    f_0 ... f_(l-1)  g_l            f_(l+1) ... f_(L-1)
        swap_bottom[l]    g_0 ... g_(l-1)  g_l            f_(l+1) ... f_(L-1)
        swap_top[l]       f_0 ... f_(l-1)  g_l            g_(l+1) ... g_(L-1)

    each as the rise of the loss over that of the model itself. arXiv 2510.02091 swaps layers of a base and a distilled
    model in this way. Neither model is changed: layers run in each other's place within a forward pass. Each of the
    three costs about L (L + 1) / 2 layers for a batch, since the layers that do not change run once.

    The report's `results["swap"]` hold `metric`, the losses `intact` (of the model), `donor` (of the donor itself) and
    `all` (the donor's layers between the model's embeddings and head), and `single`, `bottom` and `top` by layer.

    Args:
        model: a transformers model, wrapped or not.
        donor: a model with layers of the same number, kind, shapes, dtype and device.
        batches: dicts for the forward of both; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        metric: a name, module or callable, see `evaluation.choice.find_metric`.
        output: a directory in which the report is saved.
        journal: a directory to which losses are written as they are measured, so that an interrupted run resumes (not
            for a callable metric); default: `output`.
        layers_path: the stack's module name in both models, if it cannot be found.
        name: the model's name in the report; default: where it was loaded from.
        donor_name: the donor's name; default: where it was loaded from.
        show_progress: show progress bars.
        **fields: or fields of `SampleSettings` by name, for texts: sequence_length, max_samples, batch_size, pack,
            seed.

    Raises:
        ValueError: models whose layers cannot run in each other's place, or one model given twice.
    """
    stack, other = find_decoder_layers(model, layers_path), find_decoder_layers(donor, layers_path)
    check_swap(stack, other)
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    chosen = find_metric(metric, task_of_outputs(stack, batches))
    place = output if journal is None else journal
    work = Journals(place, model, batches)
    of_donor = Journals(place, donor, batches).inputs
    report = RunReport(
        kind="swap",
        model=name or name_of(stack),
        settings={
            "donor": donor_name or name_of(other),
            "metric": chosen.name,
            "layers_path": layers_path,
            **describe_batches(batches),
        },
        environment=environment_of(stack.model),
        layers={},
        results={},
    )
    if place is not None:
        report.settings["inputs"], report.settings["donor_inputs"] = work.inputs, of_donor
        report.keep_earlier(place, resumable=chosen.identity is not None)
    journals = [
        work.of(part, of_donor, chosen.identity, stack.layers_path) if chosen.identity else Journal(None, "")
        for part in ("swap single", "swap bottom", "swap top")
    ]
    report.notes.extend(config_differences(stack.config, other.config))
    _measure(stack, other, batches, chosen, journals, report, show_progress)
    if output is not None:
        report.save(output)
    return report


def check_swap(stack: DecoderLayers, other: DecoderLayers) -> None:
    """Checks that layers of two models can run in each other's place.

    Raises:
        ValueError: they cannot; says why, for the first layer of which that is so.
    """
    if stack.model is other.model:
        raise ValueError("swap: expected two models, got one model twice")
    if len(stack) != len(other):
        raise ValueError(f"swap: expected models with equally many layers, got {len(stack)} and {len(other)}")
    for layer in range(len(stack)):
        reason = why_not_exchangeable(stack, layer, other, layer)
        if reason is not None:
            raise ValueError(f"swap: expected layers of one kind and of equal shapes, got {reason} in layer {layer}")
    kinds = [{(str(p.dtype), str(p.device)) for layer in each for p in layer.parameters()} for each in (stack, other)]
    if kinds[0] != kinds[1]:
        told = " and ".join(", ".join(sorted(" on ".join(pair) for pair in kind)) for kind in kinds)
        raise ValueError(f"swap: expected models of one dtype on one device, got {told}")


def swap_cost(layers: int) -> str:
    """A sentence on what a swap costs, before it starts."""
    return (
        f"swap: {3 * layers} models take about as long as {3 * (layers + 1) / 2 + 3:.0f} passes of the samples through "
        f"the layers and {3 * (layers + 1)} through the head"
    )


def _measure(
    stack: DecoderLayers,
    other: DecoderLayers,
    batches: Sequence[Batch],
    metric: Metric,
    journals: Sequence[Journal],
    report: RunReport,
    show_progress: bool,
) -> None:
    """Fills the report."""
    own, foreign = list(stack), list(other)
    L = len(own)

    def single(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        return running_from(stack, layer, states[layer], {layer: foreign[layer]})

    def top(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        return running_from(stack, layer, states[layer], {i: foreign[i] for i in range(layer, L)})

    def bottom(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        if layer == L - 1:
            return running_only(stack, range(L, L), states[L])
        return running_from(stack, layer + 1, states[layer + 1], {i: own[i] for i in range(layer + 1, L)})

    options: dict[str, Any] = {"field": "swap", "show_progress": show_progress}
    with evaluation_mode(other):
        first = measure_changed_layers(stack, batches, metric, range(L), single, journal=journals[0], **options)
        last = measure_changed_layers(stack, batches, metric, range(L), top, journal=journals[2], **options)
        with running_from(stack, 0, None, dict(enumerate(foreign))):
            # The states before each change are those of the donor's layers.
            up = measure_changed_layers(stack, batches, metric, range(L), bottom, journal=journals[1], **options)
    intact = first[0]
    losses = {"single": first[1], "bottom": up[1], "top": last[1]}
    report.layers.update(
        {f"swap_{part}": [loss - intact for loss in found if loss is not None] for part, found in losses.items()}
    )
    told = "loss" if metric.name == "perplexity" else metric.name
    own_loss = _own_loss(other, batches, metric)
    report.results["swap"] = {"metric": told, "intact": intact, "donor": own_loss, "all": up[0], **losses}
    report.summary.extend(_summary(report))


@torch.no_grad()
def _own_loss(stack: DecoderLayers, batches: Sequence[Batch], metric: Metric) -> float | None:
    """The loss of a model itself; None for a metric that compares it with another one."""
    if metric.compares:
        return None
    device, rows = execution_device(stack.model), []
    with evaluation_mode(stack):
        for batch in batches:
            outputs, read = run_for_metric(stack, metric, to_device(batch, device))
            rows.extend(metric.rows(outputs, read, None))
    return as_loss(metric, metric.value(rows))


def _summary(report: RunReport) -> list[str]:
    found = report.results["swap"]
    single = report.layers["swap_single"]
    worst, best = (pick(range(len(single)), key=lambda i: single[i]) for pick in (max, min))
    name = found["metric"].replace("_", " ")
    donor = "" if found["donor"] is None else f", that of the donor {format_number(found['donor'])}"
    return [
        f"The {name} is {format_number(found['intact'])}{donor}; with all of the donor's layers between the model's "
        f"own embeddings and head it is {format_number(found['all'])}.",
        f"One layer of the donor changes it by {format_number(single[best])} (layer {best}) to "
        f"{format_number(single[worst])} (layer {worst}).",
    ]
