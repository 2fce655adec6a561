"""`diagnose`: all measures of a model in one report; an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from hf_cod.analysis.diagnostics.applicable import applicable
from hf_cod.analysis.diagnostics.drop_results import report_layer_drop
from hf_cod.analysis.diagnostics.findings import summarize
from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.analysis.diagnostics.forward_results import forward_results, keep_intervals, repeated_notes
from hf_cod.analysis.diagnostics.generation_drop import measure_generation_drop
from hf_cod.analysis.diagnostics.generation_results import generation_figures
from hf_cod.analysis.diagnostics.gradients import NotRecordedError, measure_gradient_norm
from hf_cod.analysis.diagnostics.journaled import ForwardResults, check_forward, check_norms
from hf_cod.analysis.diagnostics.more_measures import Request, measure_more
from hf_cod.analysis.diagnostics.settings import FORWARD_METRICS, DiagnoseFields, DiagnoseSettings
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.outputs import task_of_outputs
from hf_cod.analysis.generation.sources import listed
from hf_cod.analysis.generation.task import GenerationTask
from hf_cod.io.arguments import checked
from hf_cod.io.journal import Journal
from hf_cod.io.report import RunReport
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batch, BatchStream, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.stack import find_decoder_layers, unwrap
from hf_cod.layers.stacks import are_alternatives


class MeasurementError(ValueError):
    """A measure failed; `report` holds the results of earlier measures."""

    def __init__(self, message: str, report: RunReport) -> None:
        super().__init__(message)
        self.report = report


@checked
def diagnose(
    model: nn.Module,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    *,
    batches: BatchStream | None = None,
    drop_metric: Any = None,
    tasks: Any = None,
    output: str | Path | None = None,
    journal: str | Path | None = None,
    name: str | None = None,
    show_progress: bool = True,
    settings: DiagnoseSettings | None = None,
    **fields: Unpack[DiagnoseFields],
) -> RunReport:
    """Measures the contribution of each layer of a model.

    The report's `layers` hold one value per layer for each measure: `angular_distance` (to the next layer,
    d(x^l, x^(l+1)), in [0, 1]), `block_influence`, `variance`, `mean`, `max_abs` and `added_share` of the layer's
    output, `gradient_norm`, and `layer_drop` (the metric with that layer removed minus the metric of the intact model).

    The report's `results` hold:

    - `angular_distance`: L x L, entry n - 1 of row l, None where l + n > L or no run has these layers;
    - `runs`: number of runs of each layer in a forward pass, if a layer runs several times: its figures are then means
      over its runs, and `layer_drop` removes it from each, see `measure_forward`;
    - `effective_depth`: value, low, high, confidence;
    - `late_share`: share of the late half of the layers in the sum of angular distances; below 1/2 if deep layers turn
      the hidden state less;
    - `idle_below`: the angular distance that rounding alone can cause; if no layer turns the state further, effective
      depth and late share are left out;
    - `layer_drop`: metric, lower_is_better, intact, without (one value per layer);
    - `generation`, with tasks: `intact` and `without` (by layer) for each of three readings, also for each task in
      `tasks`; `prompts_by_layer`; `verdicts` by layer; and `rank_correlations` of the readings;
    - `layer_parameters`: number of weights in each layer's matrices;
    - `intervals`: measure -> [low, high] of each layer, 95 % percentile bootstrap over samples; for `layer_drop` those
      of `without`. Fewer than 8 samples give no interval.

    With tasks, `layers` also hold the changes of `reference_loss`, `chain_loss` and `task_accuracy` without each layer.
    On request (`metrics`), they hold `usefulness`, `causal_score`, `permutation_score`, `jacobian`, `attention_sinks`
    and `sink_heads`, `massive_ratio` and `massive_activations`, `logit_lens` and `lens_gain` (how much the layer lowers
    the loss of the logit lens), with None for layers that have no such value. Then `rank_correlations` of the results
    compare the order of the layers by each measure with that by the harm of their removal. Measures that fail are left
    out with a note if all are wanted (`metrics="all"`).

    The formulas are in `functional.depth`, `measure_layer_drop`, `measure_gradient_norm`, `measure_generation_drop`,
    `measure_usefulness`, `measure_causal_score`, `measure_permutation_score`, `measure_jacobian`,
    `measure_attention_sinks`, `measure_massive_activations` and `measure_logit_lens`.

    Args:
        model: a transformers model, wrapped or not; it is not changed.
        tokenizer: its tokenizer, required for texts.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        batches: instead of tokenizer and texts: dicts for the model's forward (images, labelled data);
            `token_batches` makes them from texts.
        drop_metric: metric of the layer drop and of other losses: a name, module or callable, see
            `evaluation.choice.find_metric`.
        tasks: tasks that the model answers without each layer: names or `GenerationTask`s, see
            `generation.sources.load_tasks`.
        output: a directory in which the report is saved.
        journal: a directory to which results are written as they are measured, so that an interrupted run resumes (a
            layer drop by a callable metric restarts, since code cannot be compared); default: `output`.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show progress bars.
        settings: settings of the measures.
        **fields: or fields of `DiagnoseSettings` by name: metrics, sequence_length, max_samples, batch_size, pack,
            seed, token, max_prompts, max_new_tokens, temperature, stop_early, layers_path.

    Raises:
        ValueError: bad settings, no layers found, text shorter than one window, activations that are not finite.
        MeasurementError: a later measure failed (for example a metric); `report` and `output` keep the earlier results.
    """
    named = drop_metric if isinstance(drop_metric, str) else None
    chosen = resolve(diagnose, DiagnoseSettings, settings, fields, drop_metric=named, tasks=_task_names(tasks))
    tasks = chosen.tasks if tasks is None else tasks
    stack = find_decoder_layers(model, chosen.layers_path)
    batches = _prepared(model, tokenizer, texts, batches, chosen)
    task = task_of_outputs(stack, batches)
    check_inputs(stack.model, batches)
    metric = find_metric(chosen.drop_metric if drop_metric is None else drop_metric, task)
    report = RunReport(
        kind="diagnose",
        model=name or name_of(stack),
        settings={**asdict(chosen), "drop_metric": metric.name, **describe_batches(batches)},
        environment=environment_of(stack.model),
        layers={},
        results={},
    )
    place = output if journal is None else journal
    journals = Journals(place, model, batches)
    if place is not None:
        report.settings["inputs"] = journals.inputs  # identifies weights and samples
        report.keep_earlier(place, resumable=metric.identity is not None)
    wanted = applicable(chosen, stack, task, batches, report)
    if "layer_drop" in wanted and metric.compares and are_alternatives(stack.model):
        report.notes.append(f"layer_drop: {metric.name} is measured on the last hidden state of the {stack.name} tower")
    if texts is not None and report.settings["samples"] < chosen.max_samples:
        report.notes.append(f"the text has {report.settings['samples']} samples, fewer than {chosen.max_samples}")
    try:
        _measure(model, batches, chosen, metric, wanted, journals, report, show_progress)
        if "generation" in wanted:
            _measure_generation(model, tokenizer, tasks, chosen, place, report, show_progress)
    except Exception as error:
        report.summary[:] = summarize(report)
        if output is not None and report.layers:
            report.save(output)
        raise MeasurementError(str(error) or type(error).__name__, report) from error
    report.results["layer_parameters"] = sizes_of(stack)
    report.summary[:] = summarize(report)
    if output is not None:
        report.save(output)
    return report


def _prepared(
    model: nn.Module, tokenizer: Any, texts: Any, batches: Iterable[Batch] | None, chosen: DiagnoseSettings
) -> list[Batch]:
    """The batches to measure on, after checks."""
    if texts is None:
        return _checked_batches(required(batches_of(model, batches, tokenizer, texts, None, {})))
    config: Any = getattr(unwrap(model), "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and chosen.sequence_length > longest:
        raise ValueError(f"sequence_length: expected at most the model's {longest}, got {chosen.sequence_length}")
    return [*required(batches_of(model, batches, tokenizer, texts, chosen, {}))]


def _checked_batches(batches: Iterable[Any]) -> list[Batch]:
    made: list[Batch] = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batches: expected dicts of tensors, got {type(batch).__name__} as batch {number}; "
                "hf_cod.token_batches(tokenizer, texts) makes them from texts"
            )
        made.append({name: value for name, value in batch.items() if value is not None})
        wrong = [name for name, value in made[-1].items() if not isinstance(value, Tensor)]
        if wrong:
            found = type(batch[wrong[0]]).__name__
            raise ValueError(
                f"batches: expected tensors, got {found} as {wrong[0]!r} of batch {number}; use torch.tensor"
            )
    if not made:
        raise ValueError("batches: expected at least one batch, got none")
    return made


def _task_names(tasks: Any) -> list[str] | None:
    """Names of tasks for the settings of a report."""
    if tasks is None:
        return None
    return [task.name if isinstance(task, GenerationTask) else task for task in listed(tasks)]


def _measure(
    model: nn.Module,
    batches: Sequence[Batch],
    chosen: DiagnoseSettings,
    metric: Any,
    wanted: list[str],
    journals: Journals,
    report: RunReport,
    show_progress: bool,
) -> None:
    """Fills the report measure by measure, cheapest first, so that a failure keeps the earlier results."""
    options: dict[str, Any] = {"layers_path": chosen.layers_path, "show_progress": show_progress}
    forward = [name for name in wanted if name in FORWARD_METRICS]
    stack = find_decoder_layers(model, chosen.layers_path)
    count = len(stack)
    # The file of another stack of the model may be the same; without a name the journals are those of earlier versions.
    where = [] if chosen.layers_path is None else [stack.layers_path]
    if forward:
        journal = journals.of("forward", forward, chosen.token, chosen.seed, *where)
        if not journal.is_sound("forward", partial(check_forward, metrics=forward, layers=count)):
            measures = measure_forward(model, batches, forward, chosen.token, **options)
            journal.add("forward", forward_results(measures, forward, chosen.seed))
        found = journal.result("forward", ForwardResults)
        report.layers.update(found["layers"])
        report.results.update(found["results"])
        report.results["intervals"] = dict(found["results"].get("intervals", {}))
        for layer in found["results"].get("not_run", []):
            report.notes.append(f"layer {layer} did not run on these inputs")
        report.notes.extend(repeated_notes(found["results"].get("runs", [])))
    if "gradient_norm" in wanted:
        journal = journals.of("gradient_norm", *where)
        try:
            if not journal.is_sound("gradient_norm", partial(check_norms, layers=count)):
                journal.add("gradient_norm", measure_gradient_norm(model, batches, **options))
            report.layers["gradient_norm"] = journal.result("gradient_norm", list[float | None])
        except NotRecordedError as error:
            if chosen.by_name:
                raise
            report.notes.append(f"gradient_norm was left out: {str(error).partition(': ')[2]}")
    if "layer_drop" in wanted:
        journal = journals.of("layer_drop", metric.identity, *where) if metric.identity else Journal(None, "")
        report_layer_drop(report, stack, batches, metric, journal, chosen.seed, options)
    measure_more(
        Request(model, batches, metric, journals, chosen.seed, where, options), wanted, report, chosen.everything
    )


def _measure_generation(
    model: nn.Module,
    tokenizer: Any,
    tasks: Any,
    chosen: DiagnoseSettings,
    place: str | Path | None,
    report: RunReport,
    show_progress: bool,
) -> None:
    """Adds what the model answers without each layer."""
    found = measure_generation_drop(
        model,
        tokenizer,
        tasks,
        journal=place,
        layers_path=chosen.layers_path,
        show_progress=show_progress,
        settings=chosen.generation(),
    )
    layers, results, ends = generation_figures(found, chosen.seed)
    report.layers.update(layers)
    report.results["generation"] = results
    keep_intervals(report.results, **ends)
    report.notes.extend(found.notes)
    if found.left_out:
        report.notes.append(f"generation: {found.left_out} prompts were left out; the model has too few positions")
