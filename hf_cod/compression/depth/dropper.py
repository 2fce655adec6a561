"""`drop_layers`: removes layers of a model, and optionally replaces them by linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.depth.depth_plan import GIVEN, MASSIVE, DepthPlan
from hf_cod.compression.depth.maps import NO_MAPS, Maps
from hf_cod.compression.depth.settings import REPLACEMENTS, DropLayersFields, DropLayersSettings
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport
from hf_cod.io.settings import SampleSettings, check_choice, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, describe_batches, split_samples
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import name_of, other_name, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.removal.drop import check_drop, drop
from hf_cod.layers.size import count_parameters
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers

# Share of the samples on which maps are measured, and to which they are not fitted.
CHOICE_SHARE = 1 / 4


@renamed(path="layers_path")
@for_one_thread
@checked
def drop_layers(
    model: nn.Module,
    plan: DepthPlan | Sequence[int] | int,
    replacement: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    settings: DropLayersSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[DropLayersFields],
) -> RunReport:
    """Removes layers permanently, as `drop` does; the result is a stock model.

    | replacement | replaces each run of removed layers by | requires |
    |---|---|---|
    | none | nothing | nothing |
    | linear | a linear map, folded into the last matrix before the run (ReplaceMe, arXiv 2505.02819) | batches |
    | measured | the same map, if it lowers the loss on the last quarter of the samples, not used to fit it | batches |

    A map requires a layer before the run whose last matrix adds its output to the hidden state. Pre-LN families have
    such a matrix; it is missing where a norm follows (Post-LN, sandwich norms) or experts are stored in banks. In these
    cases, and if weights cannot be changed or nothing can be measured, the layers are removed without a map, and the
    notes give the reason. `functional/linear_map.py` has the equation.

    The report's `layers` hold `cost` (of the plan, if it has costs), `removed` (1 or 0) and `parameters`; its
    `results` hold `removed`, `protected`, `candidates` and `criterion` of the plan, `parameters` of the full model
    before and after, and `replacements`: for each run of layers {"layers", "matrix", "explained", "used"} and, with
    replacement "measured", "loss": {"plain", "linear"}.

    Args:
        model: a transformers model, wrapped or not; maps require plain weights.
        plan: from `plan_depth`; or the layers to remove, as indices or one index.
        replacement: see the table; default: the one with which the plan's candidates were compared; none if `plan` is
            given as indices.
        batches: dicts for the model's forward; `token_batches` makes them from texts. attention_mask (S, T) marks
            padding, which is ignored.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        settings: the replacement of removed layers.
        **fields: for texts, also fields of `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: a plan for another model, layers that do not exist, no layers left, missing batches; see also
            `drop`. After any error or interruption, the model is unchanged.
    """
    chosen = resolve(drop_layers, DropLayersSettings, settings, fields, replacement=replacement).replacement
    stack = find_decoder_layers(model, layers_path)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    described = DropReporter(stack, name)
    if not isinstance(plan, DepthPlan):
        plan = DepthPlan(name_of(stack), GIVEN, [plan] if isinstance(plan, int) else sorted(plan), described.sizes)
    chosen = plan.replacement if chosen is None else chosen
    check_choice("replacement", chosen, REPLACEMENTS)
    if chosen != "none":
        check_needed(batches, f"for replacement {chosen}")
    if batches:
        check_inputs(stack.model, batches)
    plan.check(stack)
    check_drop(model, plan.layers, layers_path)
    maps = Maps()
    try:
        if batches and chosen != "none":
            _put_maps(stack, plan.layers, batches, chosen == "measured", maps)
        drop(model, plan.layers, layers_path)
    except BaseException:
        maps.take_back()
        raise
    return described.report(plan, chosen, batches or [], maps)


class DropReporter:
    """Records the sizes of a model before layers are removed, and makes the report afterwards.

    Args:
        stack: the layers.
        name: the model's name, or None.
    """

    def __init__(self, stack: DecoderLayers, name: str | None) -> None:
        self.stack = stack
        self.name = name or name_of(stack)
        self.sizes = sizes_of(stack)
        self.parameters = count_parameters(stack.model)
        self.environment = environment_of(stack.model)

    def report(self, plan: DepthPlan, replacement: str, batches: Sequence[Batch], maps: Maps) -> RunReport:
        """Counts the remaining weights, and makes the report."""
        left = count_parameters(self.stack.model)
        return RunReport(
            kind="drop-layers",
            model=self.name,
            settings={"criterion": plan.criterion, "replacement": replacement, **describe_batches(batches)},
            environment=self.environment,
            layers={
                **({"cost": plan.costs} if plan.costs else {}),
                "removed": [int(index in plan.layers) for index in range(len(self.sizes))],
                "parameters": self.sizes,
            },
            results={
                "removed": plan.layers,
                "criterion": plan.criterion,
                "protected": plan.protected,
                "candidates": plan.candidates,
                "parameters": {"intact": self.parameters, "dropped": left},
                "replacements": maps.replacements,
            },
            summary=_summary(plan, self.parameters, left, maps.replacements),
            notes=[*other_name("plan", plan.model, self.stack), *_other_replacement(plan, replacement), *maps.notes],
        )


def _put_maps(stack: DecoderLayers, removed: list[int], batches: Sequence[Batch], measured: bool, maps: Maps) -> None:
    """Fits maps to the samples; if measured, to the first three quarters of them, and measures them on the last."""
    if not measured:
        maps.put(stack, removed, batches)
        return
    samples = describe_batches(batches)["samples"]
    if samples < 2:
        why = f"at least two samples are required, one to fit and one to measure, got {samples}"
        maps.notes.append(NO_MAPS.format(why))
        return
    fitting, measuring = split_samples(batches, samples - max(1, round(samples * CHOICE_SHARE)))
    maps.put(stack, removed, fitting, measuring)


def _other_replacement(plan: DepthPlan, replacement: str) -> list[str]:
    if not plan.candidates or replacement == plan.replacement:
        return []
    return [f"the plan compared its candidates with replacement {plan.replacement}; here, {replacement} is used"]


def _summary(plan: DepthPlan, before: int, after: int, replacements: list[dict[str, Any]]) -> list[str]:
    removed = ", ".join(map(str, plan.layers))
    why = "as given" if plan.criterion == GIVEN else f"selected by {_words(plan.criterion)}"
    if plan.chosen:
        why += f" (best of its candidates: {' and '.join(map(_words, plan.chosen))})"
    found = [
        f"{len(plan.layers)} of {len(plan.parameters)} layers are removed ({removed}), {why}; {after:,} of {before:,} "
        "parameters remain."
    ]
    if plan.protected:
        why = ": massive activations arise there" if plan.protection == MASSIVE else ", as given"
        told = "Layer {} was" if len(plan.protected) == 1 else "Layers {} were"
        found.append(f"{told.format(', '.join(map(str, plan.protected)))} protected{why}.")
    if plan.candidates:
        order = sorted(plan.candidates, key=lambda name: plan.candidates[name]["loss"])
        told = ", ".join(f"{_words(name)} {plan.candidates[name]['loss']:.3f}" for name in order)
        how = ", with maps" if any(found.get("maps") for found in plan.candidates.values()) else ""
        found.append(f"{_words(plan.metric).capitalize()} on samples that the search did not use{how}: {told}.")
    if replacements:
        used = [entry["matrix"] for entry in replacements if entry["used"]]
        where = f": {', '.join(used)}" if used else ""
        found.append(f"{len(used)} of {len(replacements)} linear maps that replace layers are kept{where}.")
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")
