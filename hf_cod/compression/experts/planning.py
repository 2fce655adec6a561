"""`plan_experts`: decides which experts to remove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.experts.expert_plan import ExpertPlan
from hf_cod.compression.experts.settings import PlanExpertsFields, PlanExpertsSettings
from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer
from hf_cod.layers.batches import batches_of
from hf_cod.layers.checks import name_of, sizes_of
from hf_cod.layers.removal.experts import check_left, check_removal, groups_of, mixtures_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.expert_methods import score_experts
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.settings import COMPUTED, EXPERT_METHODS


@checked
def plan_experts(
    model: nn.Module,
    share: float,
    scores: ExpertScores | None = None,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: PlanExpertsSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[PlanExpertsFields],
) -> ExpertPlan:
    """Decides which experts to remove: those with the lowest scores in each layer. The model is not changed.

    The number is the same in all layers, because a config counts experts once. It is the share of the experts, rounded
    to the nearest number that is possible: with groups of experts (DeepSeek-V3), each group loses equally many and
    keeps two, because its router sums the best two scores of a group.

    Args:
        model: a transformers model with a mixture of experts, wrapped or not.
        share: share of the experts to remove; 0 removes none.
        scores: from `score_experts`; default: computed from the batches.
        method: method of the scores (see `score_experts`); default: reap.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show a progress bar.
        settings: how experts are selected.
        **fields: or fields of `PlanExpertsSettings` by name: threshold (of method owl); for texts, also fields of
            `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: a model without experts, or with a config that cannot describe the result; a share that removes all
            experts or none; weights that are quantized, offloaded or shared; neither scores nor batches.
    """
    how = resolve(plan_experts, PlanExpertsSettings, settings, fields, method=method)
    stack = find_decoder_layers(model, layers_path)
    found = mixtures_of(stack)
    count, groups = next(iter(found.values())).count, groups_of(stack.config)
    number = count_removed(share, count, groups)
    check_number(stack, number)  # before anything is measured
    if scores is None:
        scores = _score(stack, how, batches_of(model, batches, tokenizer, texts, samples, fields), show_progress)
    else:
        check_effect(how, ["method", "threshold"], COMPUTED)
    scores.check(stack)
    return ExpertPlan(
        model=name_of(stack),
        method=scores.method,
        removed={name: lowest(scores.values[name], number, groups) for name in found},
        layers={name: scores.layers[name] for name in found},
        count=count,
        parameters=sizes_of(stack),
        values={name: scores.values[name] for name in found},
        tokens={name: scores.tokens[name] for name in found},
        settings=scores.settings,
    )


def _score(
    stack: DecoderLayers, how: PlanExpertsSettings, batches: Batches | None, show_progress: bool
) -> ExpertScores:
    used = EXPERT_METHODS[how.method].settings
    check_effect(how, {"threshold"}.difference(used), f"method {how.method}, which does not use it")
    chosen: dict[str, Any] = {name: getattr(how, name) for name in used}
    path = stack.layers_path
    return score_experts(
        stack.model, method=how.method, batches=batches, layers_path=path, show_progress=show_progress, **chosen
    )


def count_removed(share: float, count: int, groups: int) -> int:
    """The number of experts to remove in each layer, a multiple of the number of groups.

    Raises:
        ValueError: a share outside of 0..1, or one for which the nearest number removes none, or too many; one expert.
    """
    if not 0 <= share < 1 or math.isnan(share):
        raise ValueError(f"share: expected a share of the experts of at least 0 and below 1, got {share}")
    if share and count == groups:
        known = f"{groups} expert{'s' * (groups > 1)}"
        raise ValueError(f"model: expected more than {known} in each mixture, to remove some, got {count}")
    number = round(share * count / groups) * groups
    if share and not number:
        raise ValueError(
            f"share: expected at least {groups / count:.3g}, which removes {groups} of {count} experts, got {share}"
        )
    if number:
        check_left(count - number, groups)
    return number


def check_number(stack: DecoderLayers, number: int) -> None:
    """Checks that so many experts can be removed from each mixture, equally many of each group.

    Raises:
        ValueError: they cannot, see `remove_experts`.
    """
    found = mixtures_of(stack)
    count, groups = next(iter(found.values())).count, groups_of(stack.config)
    left = [e for e in range(count) if e % (count // groups) >= number // groups]
    check_removal(stack.model, dict.fromkeys(found, left), stack.layers_path)


def lowest(values: Sequence[float], number: int, groups: int) -> list[int]:
    """The experts with the lowest scores, equally many in each group, in ascending order."""
    size = len(values) // groups
    found: list[int] = []
    for start in range(0, len(values), size):
        found += sorted(range(start, start + size), key=lambda e: (values[e], e))[: number // groups]
    return sorted(found)
