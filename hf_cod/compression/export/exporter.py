"""`export`: a plan of bits for an engine, and the files that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics, collect_statistics
from hf_cod.compression.export.plan import ExportPlan, matrices_of, plan_as_given, plan_by_scores
from hf_cod.compression.export.request import Request, Written
from hf_cod.compression.export.search import search_widths
from hf_cod.compression.export.settings import ExportFields, ExportSettings
from hf_cod.compression.export.targets import TARGETS, Target
from hf_cod.compression.quantization.plan import BitPlan
from hf_cod.io.arguments import checked
from hf_cod.io.output_checks import check_unused
from hf_cod.io.quantized import check_unquantized
from hf_cod.io.report import RunReport, environment
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of
from hf_cod.layers.checks import name_of
from hf_cod.layers.devices import execution_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.module_choice import ModuleChoice, choose_modules, other_notes
from hf_cod.layers.sensitive_modules import left_notes
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.search_results import with_search

SEED = 0  # of the search


@for_one_thread
@checked
def export(
    model: PreTrainedModel,
    output: str | Path,
    settings: ExportSettings | None = None,
    *,
    scores: LayerScores | None = None,
    plan: LayerAllocation | BitPlan | None = None,
    statistics: LayerStatistics | None = None,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    samples: SampleSettings | None = None,
    **fields: Unpack[ExportFields],
) -> RunReport:
    """Distributes bits over layers for an engine, and writes the files that it reads.

    | to | files | widths |
    |---|---|---|
    | compressed-tensors | a checkpoint for vLLM and transformers | 2 to 8 |
    | llama.cpp | tensor-types.txt and imatrix.gguf for llama-quantize | 2, 3, 4, 5, 6, 8 |
    | gptqmodel | quantize_config.json | 2, 3, 4, 8 |
    | auto-round | layer_config.json | 2, 3, 4, 8 |
    | mlx | sensitivities.json, quantization.json | 2, 3, 4, 5, 6, 8 |
    | exl3 | override.yaml | 2, 3, 4, 5, 6, 8 |

    All matrices get the largest width that fits the budget; layers with the highest scores get the next larger one.
    With `search`, widths are searched instead, among those near the budget: whole plans are measured by the divergence
    of the model with matrices rounded to grids like the engine's (`search_plan`); scores are where the search starts.
    Matrices that an engine fuses (query, key and value; gate and up) share a width. Embeddings and head are not
    quantized by us; the report's notes list matrices that are left out, and its summary the command line of the engine.

    For compressed-tensors the matrices are rounded in place to a uniform symmetric grid; with batches, layer after
    layer with error compensation (GPTQ, arXiv 2210.17323) and coordinate descent (QuantEase, arXiv 2309.01885). The
    model then computes what the checkpoint does. For other engines the model is not changed.

    Args:
        model: a transformers model with plain weights in memory.
        output: a new or empty directory.
        settings: the engine, the budget, and the matrices.
        scores: of this model, from `score_layers`; default: all layers are equal, and earlier ones come first.
        plan: bits of each layer or matrix, instead of a budget and scores.
        statistics: of this model: without batches they weight the errors of compressed-tensors; for llama.cpp they are
            the importance matrix.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer; also saved with a checkpoint.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which each finished layer of a checkpoint is saved; the same call resumes from it.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        **fields: or fields of `ExportSettings` by name: to, bits, group_size, search, passes, embedding_bits,
            search_embedding, gguf, include, exclude; for texts, also fields of `SampleSettings`: sequence_length,
            max_samples, batch_size, pack, seed.

    Raises:
        ImportError: a package of the target is not installed.
        ValueError: bits out of range for the engine (says the least and the most), a plan or scores of another model, a
            width that the engine lacks, fused matrices of different widths, weights that cannot be replaced, a GGUF of
            another model.
    """
    chosen = resolve(export, ExportSettings, settings, fields)
    target, directory = TARGETS[chosen.to], Path(output)
    check_unused(directory)
    if plan is not None:
        if scores is not None:
            raise ValueError("scores: expected none with a plan, which has the bits of each layer, got both")
        check_effect(chosen, ["bits", "search"], "a plan, which has the bits of each layer")
    stack = find_decoder_layers(model, layers_path)
    check_unquantized(model, name_of(stack))
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    if batches is not None:
        check_inputs(stack.model, batches)
    if statistics is not None:
        statistics.check(stack)
    choice = choose_modules(stack, chosen)
    more: dict[str, Any] = {"journal": journal, "layers_path": layers_path, "show_progress": show_progress}
    planned, found = _plan(choice.stack, target, chosen, scores, plan, batches, more)
    directory.mkdir(parents=True, exist_ok=True)
    if target.weighted and statistics is None and batches is not None:
        statistics = collect_statistics(model, batches, layers_path=layers_path, name=name, show_progress=show_progress)
    kept = (scores, statistics, batches, journal, show_progress)
    embedding = found.get("embedding_bits", chosen.embedding_bits)
    request = Request(choice.stack, planned, directory, *kept, embedding_bits=embedding, gguf=chosen.gguf)
    written = target.write(request)
    if target.rounds and tokenizer is not None:
        tokenizer.save_pretrained(directory)
    told = {"to": chosen.to, "group_size": planned.group, "score": None if plan else planned.method, **choice.given}
    told |= {} if batches is None else describe_batches(batches)
    report = _report(choice, target, planned, written, scores, name or name_of(stack), told)
    return with_search(report, found)


def _plan(
    stack: DecoderLayers,
    target: Target,
    settings: ExportSettings,
    scores: LayerScores | None,
    plan: LayerAllocation | BitPlan | None,
    batches: Batches | None,
    more: dict[str, Any],
) -> tuple[ExportPlan, dict[str, Any]]:
    """The plan, and what the search says about it."""
    matrices = matrices_of(stack, target, settings.group_size, target.grouped)
    if plan is not None:
        found = plan.search if isinstance(plan, LayerAllocation) else {}
        return plan_as_given(stack, target, matrices, plan), dict(found)
    if not settings.search:
        return plan_by_scores(stack, target, matrices, settings.bits, scores), {}
    if batches is None:
        raise ValueError("batches: expected samples for the search, got none")
    how = {"scores": scores, "passes": settings.passes, "seed": SEED, **more}
    how |= {"embedding": settings.embedding_bits} if settings.search_embedding else {}
    return search_widths(stack, target, matrices, settings.bits, batches, **how)


def _report(
    choice: ModuleChoice,
    target: Target,
    plan: ExportPlan,
    written: Written,
    scores: LayerScores | None,
    title: str,
    told: dict[str, Any],
) -> RunReport:
    stack = choice.stack
    table: dict[str, list[Any]] = {"bits": [], "parameters": []}
    errors: list[float | None] = []
    for index in range(len(stack)):
        names = [name for name in plan.widths if plan.layers[name] == index]
        table["bits"].append(plan.bits(names))
        table["parameters"].append(sum(plan.sizes[name][0] * plan.sizes[name][1] for name in names))
        found = [written.errors[name] for name in names if name in written.errors]
        errors.append(sum(found) / len(found) if found else None)
    if written.errors:
        table["error"] = errors
    if scores is not None:
        table["score"] = scores.values
    parameter = next(p for p in stack.model.parameters() if p.is_floating_point())
    size = f"{plan.weights:,} weights of the layers' matrices in {plan.bits():.3f} bits each, scales included"
    return RunReport(
        kind="export",
        model=title,
        settings=told,
        environment=environment(execution_device(stack.model), parameter.dtype),
        layers=table,
        results={
            "bits": plan.bits(),
            "planned_bytes": sum(plan.stored.values()) // 8,
            "module_bits": plan.widths,
        },
        summary=[f"{size}, in the format of {target.name}.", *written.summary],
        notes=[
            *written.notes,
            *choice.notes("quantized"),
            *other_notes(stack, "quantized"),
            *left_notes(stack, plan.left),
        ],
    )
