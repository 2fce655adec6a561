"""`prune`: sets weights of a model's matrices to zero, with the sparsity that an allocation gives each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.pruning.methods import (
    METHODS,
    Method,
    check_pattern,
    measure_expert_sparsity,
    measure_sparsity,
    prune_layer,
)
from hf_cod.compression.pruning.settings import PruneFields, PruneSettings
from hf_cod.compression.pruning.targets import Targets, targets_of
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import check_writable, name_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.direct_use import DirectUse, check_unwritten
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_notes import check_unseen
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.module_choice import ModuleChoice, choose_modules, other_notes
from hf_cod.layers.own_changes import undoing_own_changes
from hf_cod.layers.running import naming_weights
from hf_cod.layers.sequential import Sums, change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.search_results import with_search


@renamed(path="layers_path")
@for_one_thread
@undoing_own_changes
@checked
def prune(
    model: nn.Module,
    plan: LayerAllocation | float | str,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    statistics: LayerStatistics | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    settings: PruneSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[PruneFields],
) -> RunReport:
    """Sets weights of the layers' matrices to zero, in place; embeddings, head, norms and biases are left unchanged.

    | method | removes the weights of smallest | compared within | requires |
    |---|---|---|---|
    | magnitude | abs(W_ij) | the matrix | nothing |
    | wanda | abs(W_ij) ||X_j||_2 (arXiv 2306.11695) | the row | batches or statistics |
    | sparsegpt | (W_ij / U_jj)^2, with error compensation (arXiv 2301.00774) | 128 columns | batches |

    With batches, layers are pruned one after another; the calibration inputs of a layer are the outputs of the pruned
    layers before it. Each layer runs twice. In addition to the model, memory holds one layer's sums and the hidden
    states of the batches (on the CPU). With statistics of the intact model all layers are pruned at once, without a
    forward pass. An N:M pattern keeps N of every M consecutive weights of a row, in every layer. Experts to which no
    token was routed are pruned by magnitude; the report names them.

    With `include` and `exclude` the targets are those of the chosen matrices of a layer, and only these are counted.

    The report's `layers` hold `target` and `sparsity` (counted in the weights) and `parameters`, one value for each
    layer; its `results` hold `sparsity` (of all matrices together) and `module_sparsity` (name -> sparsity), with
    a plan by expert `expert_sparsity` (name of the experts -> sparsity of each), and with one of `search_plan` its
    `search`.

    Args:
        model: a transformers model with plain weights. After an error in the activations of a layer, the layers before
            it are pruned, the others are not.
        plan: an allocation of sparsity; one sparsity for all layers; or a pattern for all layers, such as "2:4".
        method: see the table; default: wanda.
        batches: dicts for the model's forward; `token_batches` makes them from texts. attention_mask (S, T) marks
            padding, which is ignored.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        statistics: of this model, from `collect_statistics`; for wanda, instead of batches.
        journal: a directory to which each finished layer is saved; the same call on the same intact model resumes from
            it. The files are not removed.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        settings: how the weights to remove are chosen.
        **fields: or fields of `PruneSettings` by name: `include` and `exclude`, the matrices to prune, as PEFT's
            target_modules and exclude_modules: a list of names, or one regular expression for whole names; for texts,
            also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: an unknown method, a plan out of range or for another model, a pattern that does not divide the
            rows, missing batches or statistics, weights that cannot be pruned in place (adapters, quantized,
            offloaded, shared by two matrices), NaN or infinity in weights or activations (says where), a model that
            changes its weights in eval mode for good.
    """
    how = resolve(prune, PruneSettings, settings, fields, method=method)
    method = how.method
    stack = find_decoder_layers(model, layers_path)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    chosen = _chosen(method, batches, statistics)
    if batches is not None:
        check_inputs(stack.model, batches)
    targets = targets_of(plan, stack)
    choice = choose_modules(stack, how)
    check_writable(choice.stack, in_files=True)
    use = check_unwritten(stack.model, batches)
    for M in {t.pattern[1] for t in targets.all if t.pattern is not None}:
        check_pattern(choice.stack, M)
    if statistics is not None:
        statistics.check(stack)
    told: dict[str, Any] = {"method": method, "plan": _described(plan), **choice.given}
    work = [method, [(t.sparsity, t.pattern) for t in targets.layers], *choice.identity, *targets.of_parts]
    finished = _finished(journal, choice.stack, batches, statistics, work)

    def prune_one(index: int, sums: Sums | None) -> list[str]:
        return prune_layer(choice.stack, index, chosen, sums, partial(targets.of, index))

    passes: list[str] = []
    if chosen.recorder is not None and batches is not None:
        with naming_weights(stack.model):
            passes = change_sequentially(
                choice.stack, batches, chosen.recorder, prune_one, finished, "pruning", show_progress
            )
        told |= describe_batches(batches)
    else:
        change_each(stack, prune_one, finished, "pruning", show_progress, statistics)
    report = _report(choice, targets, finished, told, name, use, passes)
    return with_search(report, plan.search if isinstance(plan, LayerAllocation) else {})


def _chosen(method: str, batches: Sequence[Batch] | None, statistics: LayerStatistics | None) -> Method:
    chosen = METHODS[method]
    if batches is not None and statistics is not None:
        raise ValueError("statistics: expected batches or statistics, got both")
    if statistics is not None and chosen.recorder is not None and not chosen.takes_squares:
        raise ValueError(f"statistics: expected batches for {method}, got statistics, which hold sums of squares alone")
    if chosen.recorder is not None and statistics is None:
        check_needed(batches, f"for {method}")
    return chosen


def _described(plan: LayerAllocation | float | str) -> str:
    if not isinstance(plan, LayerAllocation):
        return str(plan)
    group = f", N:{plan.group}" if plan.group is not None else ""
    each = f", for each {plan.granularity}" if plan.modules else ""
    return f"{plan.budget:g} by {plan.method}{group}{each}"


def _finished(
    journal: str | Path | None,
    stack: DecoderLayers,
    batches: Sequence[Batch] | None,
    statistics: LayerStatistics | None,
    settings: list[Any],
) -> FinishedLayers:
    sums = {} if statistics is None else statistics.digests()
    work = fingerprint_of_work(journal, stack.model, batches, sums, settings)

    def put_back(index: int, tensors: dict[str, Tensor]) -> None:
        for name, W in stack.matrices(index):
            if tensors[name].shape != W.shape:
                raise ValueError(f"{name}: expected shape {tuple(W.shape)}, got {tuple(tensors[name].shape)}")
            W.copy_(tensors[name])

    def check_note(index: int, note: Any) -> None:
        check_unseen(note, [name for name, _ in stack.matrices(index)], measured=bool(batches) or bool(sums))

    return FinishedLayers(journal, work, lambda index: dict(stack.matrices(index)), put_back, check_note)


def _report(
    choice: ModuleChoice,
    targets: Targets,
    finished: FinishedLayers,
    settings: dict[str, Any],
    name: str | None,
    use: DirectUse,
    passes: list[str],
) -> RunReport:
    stack = choice.stack
    layers, results = measure_sparsity(stack)
    results |= {"expert_sparsity": measure_expert_sparsity(stack)} if targets.parts else {}
    return RunReport(
        kind="prune",
        model=name or name_of(stack),
        settings=settings,
        environment=environment_of(stack.model),
        layers={
            "target": [t.sparsity if n else None for t, n in zip(targets.layers, layers["parameters"], strict=True)],
            **layers,
        },
        results=results,
        summary=[
            f"{results['sparsity']:.2%} of {sum(layers['parameters']):,} weights in the layers' matrices are zero."
        ],
        notes=[
            *choice.notes("pruned"),
            *other_notes(stack, "pruned"),
            *use.notes_on(stack),
            *passes,
            *(
                f"{matrix} is pruned by magnitude: {use.reasons[matrix]}"
                if matrix in use.reasons
                else f"no token entered {matrix}: pruned by magnitude"
                for layer in finished.notes.values()
                for matrix in layer
            ),
        ],
    )
