"""`plan_repeat`: searches for the block of layers whose repetition lowers the loss most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.intervals import ends_of
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric, as_loss
from hf_cod.analysis.evaluation.outputs import task_of_outputs
from hf_cod.compression.depth.repeat_plan import SEARCH, RepeatPlan
from hf_cod.compression.depth.repeat_probe import INTACT, Block, RepeatProbe
from hf_cod.compression.depth.settings import RepeatFields, RepeatSettings
from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches, split_samples
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.independence import check_independent
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.removal.repeat import check_repeat
from hf_cod.layers.stack import find_decoder_layers


@checked
def plan_repeat(
    model: nn.Module,
    length: int | list[int] | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: RepeatSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[RepeatFields],
) -> RepeatPlan:
    """Decides which block of layers to repeat, by the measured loss with each block repeated. The model is not changed.

    All blocks of the given lengths are measured on the first half of the samples, and the one with the lowest loss is
    chosen. As the best of many blocks looks better than it is, its loss is measured again on the second half, beside
    that of the intact model. `interval` of the plan is the paired bootstrap interval (Efron 1979) of the difference
    over these samples, and `gains` says whether all of it is below 0. If it is not, no gain was found: the plan is
    returned all the same, and the user decides.

    A block of n layers that ends before layer e costs (times - 1) n + L - e layers for each sample of the first half,
    because the layers before e run once for all blocks.

    Args:
        model: a transformers model, wrapped or not.
        length: number of layers of a block, or several numbers; default: 4.
        batches: dicts for the model's forward; `token_batches` makes them from texts. At least two samples, and dozens
            are better: below sixteen there is no interval.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which the measurements are saved; the same call on the same model resumes from it.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show progress bars.
        settings: which blocks are tried, and by what they are judged.
        **fields: or fields of `RepeatSettings` by name: `times` (how often a block runs), `metric` (perplexity, by its
            logarithm; accuracy, the share of correct next tokens; loss of a head; or a callable
            `metric(outputs, batch)` that returns one score per sample); for texts, also fields of `SampleSettings`:
            sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: a length that no block can have, too few samples, a model or a metric without a loss, layers that
            share keys and values, only blocks that the config cannot describe (see `repeat`), a loss that is not
            finite (says with which block).
    """
    how = resolve(plan_repeat, RepeatSettings, settings, fields, length=length)
    stack = find_decoder_layers(model, layers_path)
    blocks = blocks_of(len(stack), how.lengths)
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    check_inputs(stack.model, batches)
    check_independent(stack, "layers", batches)
    metric = find_metric(how.metric, task_of_outputs(stack, batches))
    if metric.compares:
        raise ValueError(
            f"metric: expected one that says how good an output is, got {metric.name}; use a model with a head and "
            "batches with labels, or pass a callable"
        )
    count = describe_batches(batches)["samples"]
    if count < 2:
        raise ValueError(f"batches: expected at least two samples, one for the search and one to measure, got {count}")
    seen, unseen = split_samples(batches, count // 2)
    journals = Journals(None if metric.identity is None else journal, stack.model, batches)
    told = (metric.identity, how.times, stack.layers_path)
    search, held_out = (
        RepeatProbe(stack, metric, how.times, part, journals.of("repetitions", name, *told), show_progress)
        for name, part in (("search", seen), ("held out", unseen))
    )
    intact, *found = search.losses([INTACT, *blocks], f"{len(blocks)} blocks")
    tried = sorted(zip(found, blocks, strict=True))
    start, end = _possible(model, [block for _, block in tried], how.times, layers_path)
    before, after = held_out.losses([INTACT, (start, end)], "chosen block")
    return RepeatPlan(
        model=name_of(stack),
        start=start,
        end=end,
        parameters=sizes_of(stack),
        times=how.times,
        criterion=SEARCH,
        candidates=[{"start": block[0], "end": block[1], "loss": loss} for loss, block in tried],
        losses={"intact": before, "repeated": after, "searched": intact},
        interval=_interval(metric, held_out.rows(INTACT), held_out.rows((start, end))),
        metric="loss" if metric.name == "perplexity" else metric.name,  # its logarithm
    )


def blocks_of(depth: int, lengths: Sequence[int]) -> list[Block]:
    """All blocks of these lengths.

    Raises:
        ValueError: a length that no block can have.
    """
    wrong = [length for length in lengths if not 1 <= length <= depth]
    if wrong or not lengths:
        raise ValueError(f"length: expected 1..{depth}, the number of layers, got {wrong[0] if wrong else 'none'}")
    return [(start, start + length) for length in sorted({*lengths}) for start in range(depth - length + 1)]


def search_cost(depth: int, lengths: Sequence[int], times: int = 2) -> float:
    """Forward passes through all layers that the search takes for each sample of its half.

    Args:
        depth: number of layers.
        lengths: lengths of the blocks.
        times: how often a block runs.
    """
    layers = [
        (times - 1) * (end - start) + (depth if start == 0 else depth - end) for start, end in blocks_of(depth, lengths)
    ]
    return 2 + sum(layers) / depth  # the intact model, and the layers before the ends of blocks


def _possible(model: nn.Module, blocks: Sequence[Block], times: int, layers_path: str | None) -> Block:
    """The first block that can be repeated."""
    refused: ValueError | None = None
    for start, end in blocks:
        try:
            check_repeat(model, start, end, times, layers_path)
            return start, end
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _interval(metric: Metric, intact: list[Any], repeated: list[Any]) -> list[float]:
    """[low, high] of the loss with repetition minus that without, by resampling samples; empty if there is none.

    For means and for quotients of sums, the metric's value for all rows is that of their mean row.
    """
    try:
        rows = torch.tensor([intact, repeated], dtype=torch.float64).transpose(0, 1)  # (S, 2) or (S, 2, sums)
    except (TypeError, ValueError):
        return []

    def differences(means: Tensor) -> Tensor:
        losses = [[as_loss(metric, metric.value([row])) for row in draw] for draw in means.tolist()]
        return means.new_tensor([[after - before] for before, after in losses])

    if rows.dim() != 2 and (rows.dim() != 3 or rows.shape[-1] != 2):
        return []
    ends = ends_of(rows, 0, differences)
    return [] if ends is None else ends[0]
