"""`drop_experts`: removes whole experts of a mixture, or merges them into those that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.experts.expert_plan import GIVEN, ExpertPlan
from hf_cod.compression.experts.merging import mixing, most_similar
from hf_cod.compression.experts.planning import plan_experts
from hf_cod.compression.experts.settings import DropExpertsFields, DropExpertsSettings, PlanExpertsSettings
from hf_cod.io.arguments import checked
from hf_cod.io.report import RunReport
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import name_of, other_name, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.removal.experts import check_removal, mixtures_of, remove_experts
from hf_cod.layers.size import count_parameters
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.expert_methods import score_experts
from hf_cod.scoring.expert_scores import ExpertScores


@for_one_thread
@checked
def drop_experts(
    model: nn.Module,
    plan: ExpertPlan | Mapping[str, Sequence[int]] | float,
    scores: ExpertScores | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    settings: DropExpertsSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[DropExpertsFields],
) -> RunReport:
    """Removes whole experts permanently, equally many in each layer; the result is a stock model.

    The matrices and biases of the experts go with their rows of the router and of its biases. Shared experts stay. The
    result computes what the intact model would with the removed experts masked in its router. If fewer experts are left
    than a token is routed to, that number is lowered in the config, with a note. While weights are replaced, memory
    holds the intact experts and the kept ones.

    With `merge`, each removed expert is merged into the kept one of its layer with the largest cosine similarity of
    their flattened weights. The weights, and biases of banks, of the kept expert become the mean of all that are merged
    into it, weighted by the numbers of tokens that were routed to each. M-SMoE (arXiv 2310.01334) weights by usage,
    too, but keeps the experts that are used most, groups the others by the similarity of their router logits, permutes
    the channels of experts before the mean, and routes the tokens of a merged expert to the result. Here, the score
    decides, channels stay in their order, and the removed rows of the router are lost: a config has one row for each
    expert. REAP (arXiv 2510.13999) finds that removing experts by its score is better than merging, which is why
    removing is the default.

    The report's `layers` hold `experts` and `experts_left` (0 in layers without experts), `removed_token_share` (share
    of the tokens' routes that lead to removed experts; if measured) and `parameters` before; its `results` hold
    `removed_experts` by name, `merged_experts` (name -> removed expert -> kept one) and `parameters` of the full model
    before and after.

    Args:
        model: a transformers model with a mixture of experts, wrapped or not.
        plan: from `plan_experts`; or the share of the experts to remove (see there); or name of experts -> those to
            remove.
        scores: from `score_experts`; default: computed from the batches. With experts that are named, scores or
            batches say how many tokens were routed to each expert, which `merge` requires.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        settings: how experts are selected, and what becomes of the removed ones.
        **fields: or fields of `DropExpertsSettings` by name: method, threshold (see `score_experts`), merge; for texts,
            also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: a model without experts, a plan for another model, or a result that the config cannot describe
            (unequal numbers of experts, experts that it does not count); weights that are quantized, offloaded or
            shared; missing scores or batches. After any error or interruption, the model is unchanged.
    """
    how = resolve(drop_experts, DropExpertsSettings, settings, fields)
    stack = find_decoder_layers(model, layers_path)
    given = batches_of(model, batches, tokenizer, texts, samples, fields)
    found = None if given is None else [*given]
    if isinstance(plan, float | int):
        chosen = PlanExpertsSettings(how.method, how.threshold)
        more: dict[str, Any] = {"layers_path": layers_path, "show_progress": show_progress}
        plan = plan_experts(model, plan, scores, batches=found, settings=chosen, **more)
    else:
        check_effect(how, ["method", "threshold"], "a plan, which has the experts to remove")
        plan = plan if isinstance(plan, ExpertPlan) else _given(stack, plan)
    plan.check(stack)
    check_removal(model, plan.kept, layers_path)
    intact = _Intact(stack, name or name_of(stack))
    if not plan.tokens and (how.merge or scores is not None or found is not None):
        plan = replace(plan, tokens=_tokens(stack, scores, found, show_progress))
    merged = {n: most_similar(each, plan.kept[n]) for n, each in mixtures_of(stack).items()} if how.merge else {}
    mixings = {n: mixing(plan.kept[n], into, plan.tokens[n]) for n, into in merged.items()}
    notes = remove_experts(model, plan.kept, layers_path, mixings) if plan.n_removed else []
    return intact.report(plan, merged, {"merge": how.merge, **describe_batches(found or [])}, notes)


class _Intact:
    """Records the sizes of a model before experts are removed, and makes the report afterwards.

    Args:
        stack: the layers.
        name: the model's name.
    """

    def __init__(self, stack: DecoderLayers, name: str) -> None:
        self.stack, self.name = stack, name
        self.sizes = sizes_of(stack)
        self.parameters = count_parameters(stack.model)
        self.environment = environment_of(stack.model)

    def report(
        self, plan: ExpertPlan, merged: dict[str, dict[int, int]], told: dict[str, Any], notes: list[str]
    ) -> RunReport:
        """Counts the remaining weights, and makes the report."""
        left = count_parameters(self.stack.model)
        return RunReport(
            kind="drop-experts",
            model=self.name,
            settings={"method": plan.method, **plan.settings, **told},
            environment=self.environment,
            layers={**_by_layer(plan), "parameters": self.sizes},
            results={
                "removed_experts": plan.removed,
                "merged_experts": {n: {str(e): to for e, to in into.items()} for n, into in merged.items()},
                "parameters": {"intact": self.parameters, "dropped": left},
            },
            summary=_summary(plan, bool(merged), self.parameters, left),
            notes=[*other_name("plan", plan.model, self.stack), *notes],
        )


def _given(stack: DecoderLayers, removed: Mapping[str, Sequence[int]]) -> ExpertPlan:
    """A plan of the experts that the user named."""
    sets = mixtures_of(stack)
    if removed.keys() != sets.keys():
        raise ValueError(f"plan: expected experts of {', '.join(sets)}, got {', '.join(removed)}")
    return ExpertPlan(
        model=name_of(stack),
        method=GIVEN,
        removed={name: sorted(removed[name]) for name in sets},
        layers={name: index for name in sets if (index := stack.index_of(name)) is not None},
        count=next(iter(sets.values())).count,
        parameters=sizes_of(stack),
    )


def _tokens(
    stack: DecoderLayers, scores: ExpertScores | None, batches: Batches | None, show_progress: bool
) -> dict[str, list[int]]:
    """Number of tokens that were routed to each expert."""
    if scores is None:
        check_needed(batches, "for merge, which weights experts by usage")
        path = stack.layers_path
        scores = score_experts(
            stack.model, method="frequency", batches=batches, layers_path=path, show_progress=show_progress
        )
    scores.check(stack)
    return scores.tokens


def _by_layer(plan: ExpertPlan) -> dict[str, list[Any]]:
    """Values of each layer; of several mixtures in one layer, the sums and the mean share."""
    depth, shares = len(plan.parameters), plan.removed_token_shares()
    names: list[list[str]] = [[name for name, layer in plan.layers.items() if layer == i] for i in range(depth)]
    told: dict[str, list[Any]] = {
        "experts": [plan.count * len(each) for each in names],
        "experts_left": [(plan.count - plan.n_removed) * len(each) for each in names],
    }
    if shares:
        means = [sum(shares[name] for name in each) / max(1, len(each)) for each in names]
        told["removed_token_share"] = means
    return told


def _summary(plan: ExpertPlan, merge: bool, before: int, after: int) -> list[str]:
    how = "as given" if plan.method == GIVEN else f"those with the lowest {plan.method.replace('_', ' ')} scores"
    done = "merged into the most similar kept ones" if merge else "removed"
    found = [
        f"{plan.n_removed} of {plan.count} experts of each mixture are {done}, {how}; {after:,} of {before:,} "
        "parameters remain."
    ]
    shares = [*plan.removed_token_shares().values()]
    if shares and plan.n_removed:
        found.append(
            f"{sum(shares) / len(shares):.1%} of the tokens' routes led to them (by mixture, {min(shares):.1%} to "
            f"{max(shares):.1%})."
        )
    return found
