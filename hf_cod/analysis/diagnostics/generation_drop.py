"""What a model answers without each single layer, beside the likelihood of right answers and of its own answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.intervals import CONFIDENCE
from hf_cod.analysis.diagnostics.layer_drop import keys_of, measure_layer_drop
from hf_cod.analysis.evaluation.metrics import Perplexity
from hf_cod.analysis.generation.decoding import Decoder
from hf_cod.analysis.generation.prompts import Prompts, answer_batches, padded_left, tokenized
from hf_cod.analysis.generation.settings import GenerationFields, GenerationSettings
from hf_cod.analysis.generation.sources import load_tasks
from hf_cod.analysis.generation.task import GenerationTask
from hf_cod.functional.depth import sequential_half_width
from hf_cod.io.arguments import checked
from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batch, Tokenizer
from hf_cod.layers.fingerprints import Journals
from hf_cod.layers.removal.drop import skip
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers


@checked
@dataclass(frozen=True)
class GenerationDrop:
    """Three readings of the removal of each layer; S prompts, L layers. Column 0 is the intact model, column l + 1 the
    model without layer l.

    Attributes:
        tasks: names of the tasks.
        places: (S,) the task of each prompt.
        scores: (S, L + 1) float64, score of the generated answer; NaN where none was generated.
        reference: (S, L + 1), negative log likelihood of the reference answer in nats.
        reference_tokens: (S,) number of its tokens.
        chain: (S, L + 1), negative log likelihood of the intact model's answer in nats, teacher-forced.
        chain_tokens: (S,) number of its tokens.
        answers: the intact model's answers.
        looks: number of batches.
        left_out: number of prompts that were too long.
        notes: what was done differently for this model.
    """

    tasks: list[str]
    places: list[int]
    scores: Tensor
    reference: Tensor
    reference_tokens: Tensor
    chain: Tensor
    chain_tokens: Tensor
    answers: list[str]
    looks: int
    left_out: int = 0
    notes: list[str] = field(default_factory=list)


@checked
def measure_generation_drop(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Any,
    *,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: GenerationSettings | None = None,
    **fields: Unpack[GenerationFields],
) -> GenerationDrop:
    """The answers of a causal language model to the prompts of tasks, intact and without each single layer.

    Three readings of each removal, all on the same prompts, with y* the reference answer, y the intact model's own
    answer, y^(l) that of the model without layer l, and x the prompt:

        reference_loss   - 1/N sum log p_l(y*_t | x, y*_<t)
        chain_loss       - 1/N sum log p_l(y_t | x, y_<t)         (teacher-forced)
        task_accuracy    mean of score(y^(l))

    N counts the tokens of all answers, that of the end of the text included. Likelihoods come from
    `measure_layer_drop`. Answers are generated with a KV cache under `skip`. The comparison of likelihood and
    generation is that of arXiv 2510.02091.

    With `stop_early`, a model without a layer gets no further batches once the mean difference of its scores from those
    of the intact model on the same prompts is farther from 0 than `sequential_half_width`, so that all stops together
    are wrong with a probability of at most 0.05 for each layer. Means over fewer prompts are then slightly too extreme.

    Args:
        model: a causal language model, wrapped or not; it is not changed.
        tokenizer: its tokenizer.
        tasks: names, `GenerationTask`s, or one of them, see `load_tasks`.
        journal: a directory to which answers are written, so that an interrupted run resumes.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show progress bars.
        settings: number of prompts and tokens, temperature, and the seed.
        **fields: or fields of `GenerationSettings` by name: max_prompts, max_new_tokens, temperature, stop_early,
            batch_size, seed.

    Raises:
        ValueError: another kind of model, tasks that do not exist, a scorer that failed, or layers that cannot be
            removed (see `skip`).
    """
    chosen = resolve(measure_generation_drop, GenerationSettings, settings, fields)
    stack = find_decoder_layers(model, layers_path)
    decoder = Decoder(stack, tokenizer, chosen)
    found = load_tasks(tasks, tokenizer, chosen)
    longest = getattr(stack.config, "max_position_embeddings", None)
    prompts = tokenized(tokenizer, found, longest, chosen.max_new_tokens)
    with evaluation_mode(stack):
        groups, notes = _groups(decoder, prompts, chosen.batch_size)
    asked = [padded_left([prompts.ids[i] for i in group], decoder.padding) for group in groups]
    where = [] if layers_path is None else [stack.layers_path]
    sampled = [chosen.temperature, chosen.seed] if chosen.temperature > 0 else []
    kept = Journals(journal, model, asked).of("answers", chosen.max_new_tokens, decoder.ends, *sampled, *where)
    sweep = _Sweep(stack, decoder, tokenizer, found, prompts, groups, kept, chosen)
    answers, scores = sweep.run(show_progress)
    options: dict[str, Any] = {"layers_path": layers_path, "show_progress": show_progress}
    losses: list[tuple[Tensor, Tensor]] = []
    for said in (prompts.references, answers):
        batches = answer_batches(prompts.ids, said, groups, decoder.padding)
        own = Journals(journal, model, batches).of("layer_drop", *where)
        losses.append(_likelihood(model, batches, groups, own, options))
    return GenerationDrop(
        tasks=[task.name for task in found],
        places=[place for place, _ in prompts.places],
        scores=scores,
        reference=losses[0][0],
        reference_tokens=losses[0][1],
        chain=losses[1][0],
        chain_tokens=losses[1][1],
        answers=[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
        looks=len(groups),
        left_out=prompts.left_out,
        notes=notes,
    )


def sweep_cost(layers: int, prompts: int, settings: GenerationSettings) -> str:
    """A sentence on what a sweep costs at most, before it starts."""
    tokens = (layers + 1) * prompts * settings.max_new_tokens
    early = "; models that clearly differ stop early" if settings.stop_early else ""
    return (
        f"generation: {layers + 1} models (the intact one, and {layers} without a layer) answer at most {prompts} "
        f"prompts in at most {settings.max_new_tokens} tokens each: at most {tokens:,} tokens{early}"
    )


@dataclass(frozen=True)
class _Sweep:
    """The generated answers of the intact model and without each layer."""

    stack: DecoderLayers
    decoder: Decoder
    tokenizer: Any
    tasks: Sequence[GenerationTask]
    prompts: Prompts
    groups: Sequence[Sequence[int]]
    journal: Journal
    settings: GenerationSettings

    def run(self, show_progress: bool) -> tuple[list[list[int]], Tensor]:
        """The intact model's answers, and all scores (S, L + 1)."""
        count = len(self.stack)
        scores = torch.full((len(self.prompts.ids), count + 1), torch.nan, dtype=torch.float64)
        answers: list[list[int]] = [[] for _ in self.prompts.ids]
        bar = progress(range((count + 1) * len(self.groups)), "answers", show_progress)
        with evaluation_mode(self.stack, repacking=True), bar:
            for number in range(len(self.groups)):
                for i, ids in zip(self.groups[number], self._answered(number, -1), strict=True):
                    answers[i], scores[i, 0] = ids, self._score(ids, i)
                bar.update()
            for layer in range(count):
                with skip(self.stack.model, layer, self.stack.layers_path):
                    done = self._without(layer, scores)
                bar.update(done)
                bar.total -= len(self.groups) - done
        return answers, scores

    def _without(self, layer: int, scores: Tensor) -> int:
        """Fills a column of the scores; returns the number of batches that this took."""
        for number, group in enumerate(self.groups):
            for i, ids in zip(group, self._answered(number, layer), strict=True):
                scores[i, layer + 1] = self._score(ids, i)
            told = verdict(scores[:, layer + 1], scores[:, 0], len(self.groups))
            if self.settings.stop_early and told != "open":
                return number + 1
        return len(self.groups)

    def _answered(self, number: int, layer: int) -> list[list[int]]:
        """The answers to a batch, from the journal if it has them; layer -1 is the intact model."""
        key, group = f"answers {number} {layer}", self.groups[number]
        if not self.journal.is_sound(key, partial(_check_answers, count=len(group), most=self.settings.max_new_tokens)):
            self.journal.add(key, self.decoder.answers([self.prompts.ids[i] for i in group], group))
        found: list[list[int]] = self.journal.result(key, list[list[int]])
        return found

    def _score(self, ids: list[int], prompt: int) -> float:
        task, number = self.prompts.places[prompt]
        return self.tasks[task].scored(self.tokenizer.decode(ids, skip_special_tokens=True), number)


def verdict(scores: Tensor, intact: Tensor, looks: int) -> str:
    """Whether the removal of a layer is "harmful" or "helpful" beyond chance, else "open".

    Args:
        scores: (S,) without the layer; NaN where none was generated.
        intact: (S,) of the intact model.
        looks: number of batches, after each of which this is asked.
    """
    known = ~scores.isnan()
    mean = float((scores - intact)[known].mean())
    if abs(mean) <= sequential_half_width(int(known.sum()), looks, CONFIDENCE):
        return "open"
    return "harmful" if mean < 0 else "helpful"


def _check_answers(value: Any, count: int, most: int) -> None:
    found = check_value(value, list[list[int]], "answers", limits(least=0))
    if len(found) != count or not all(1 <= len(ids) <= most for ids in found):
        raise ValueError(f"answers: expected {count} of 1 to {most} tokens, got others")


def _groups(decoder: Decoder, prompts: Prompts, size: int) -> tuple[list[list[int]], list[str]]:
    """Numbers of the prompts of each batch; of equal length if the model does not ignore padding on the left."""
    order = range(len(prompts.ids))
    lengths = {len(ids) for ids in prompts.ids}
    if len(lengths) == 1 or size == 1 or not decoder.padding_changes(min(prompts.ids, key=len)):
        return _cut(order, size), []
    by_length = groupby(sorted(order, key=lambda i: len(prompts.ids[i])), lambda i: len(prompts.ids[i]))
    groups = [group for _, alike in by_length for group in _cut([*alike], size)]
    told = "generation: padding changes what this model predicts, so prompts of a batch have the same length"
    return sorted(groups), [told]


def _cut(numbers: Iterable[int], size: int) -> list[list[int]]:
    listed = [*numbers]
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def _likelihood(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Sequence[int]], journal: Journal, options: Any
) -> tuple[Tensor, Tensor]:
    """(S, L + 1) negative log likelihoods of the labels in nats, and (S,) numbers of labels."""
    _, without = measure_layer_drop(model, batches, Perplexity("causal_lm"), journal, **options)
    columns = []
    for layer in range(-1, len(without)):
        columns.append([row for key in keys_of(layer, len(batches)) for row in journal[key]])
    rows = torch.tensor(columns, dtype=torch.float64).transpose(0, 1)  # (S, L + 1, 2), in the order of the groups
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return rows[back, :, 0], rows[back, 0, 1]
