"""`drop_layers`: a model without some of its layers, with linear maps in their place where that is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_cod.calibration import Batch, check_batches, describe_batches, split_samples
from hf_cod.decoder_layers import DecoderLayers, find_decoder_layers
from hf_cod.depth.depth_plan import GIVEN, MASSIVE, DepthPlan
from hf_cod.depth.removal_probe import RemovalProbe
from hf_cod.depth.replacement import BlockReplacer, put_back, put_in
from hf_cod.devices import execution_device
from hf_cod.evaluation import Metric, find_metric, task_of
from hf_cod.layer_removal import check_drop, drop
from hf_cod.report import RunReport, environment
from hf_cod.same_model import name_of, sizes_of
from hf_cod.writable_weights import check_writable

REPLACEMENTS = ("none", "linear", "measured")
# Share of the samples that no map is fitted to, to measure on whether maps are better.
CHOICE_SHARE = 1 / 4


def drop_layers(
    model: nn.Module,
    plan: DepthPlan | Sequence[int],
    replacement: str = "none",
    *,
    batches: Sequence[Batch] | None = None,
    path: str | None = None,
    name: str | None = None,
) -> RunReport:
    """Removes layers for good, as `drop` does: what is left is a stock checkpoint.

    | replacement | in the place of each run of removed layers | needs |
    |---|---|---|
    | none | nothing | nothing |
    | linear | a linear map, folded into the last matrix in front (ReplaceMe, arXiv 2505.02819) | batches |
    | measured | the same, where the loss on the last quarter of the samples, which no map saw, is lower | batches |

    A map needs a layer in front whose last matrix adds its output to the hidden state: Pre-LN families have one, where
    norms follow (Post-LN, sandwich norms) or experts stand in banks there is none. Then, and where weights cannot be
    written or nothing can be measured, the layers are dropped plainly, and the notes say why.
    `functional/linear_map.py` has the equation.

    The report's `layers` hold `cost` (of the plan, where it has some), `removed` (1 or 0) and `parameters`; its
    `results` hold `removed`, `protected`, `candidates` and `criterion` of the plan, `parameters` before and after of
    the whole model, and `replacements`: for each run of layers {"layers", "matrix", "explained", "used"} and, measured,
    "loss": {"plain", "linear"}.

    Args:
        model: a transformers model, wrapped or not; for maps with plain weights.
        plan: from `plan_depth`, or the layers to remove.
        replacement: see the table.
        batches: dicts for the model's forward; attention_mask (S, T) marks padding, which does not count.
        path: the stack's module name where it cannot be found.
        name: the model's name in the report; default: where it was loaded from.

    Raises:
        ValueError: a plan for another model, no such layers, none left, batches missing; what `drop` raises. After
            these, and whatever else ends the work on the way, the model is unchanged.
    """
    stack = find_decoder_layers(model, path)
    if replacement not in REPLACEMENTS:
        raise ValueError(f"replacement: expected one of {', '.join(REPLACEMENTS)}, got {replacement!r}")
    if replacement != "none" and not batches:
        raise ValueError(f"batches: expected at least one for the replacement {replacement}, got none")
    sizes = sizes_of(stack)
    if not isinstance(plan, DepthPlan):
        plan = DepthPlan(name_of(stack), GIVEN, sorted(plan), sizes)
    plan.check(stack)
    check_drop(model, plan.layers, path)
    before = sum(p.numel() for p in stack.model.parameters())
    made = _Made([], [], [])
    device, dtype = execution_device(stack.model), next(stack.model.parameters()).dtype
    try:
        if batches and replacement != "none":
            _replace(stack, plan.layers, batches, replacement == "measured", made)
        drop(model, plan.layers, path)
    except BaseException:
        made.take_back()
        raise
    after = sum(p.numel() for p in stack.model.parameters())
    return RunReport(
        kind="drop-layers",
        model=name or name_of(stack),
        settings={"criterion": plan.method, "replacement": replacement, **describe_batches(batches or [])},
        environment=environment(device, dtype),
        layers={
            **({"cost": plan.costs} if plan.costs else {}),
            "removed": [int(index in plan.layers) for index in range(len(sizes))],
            "parameters": sizes,
        },
        results={
            "removed": plan.layers,
            "criterion": plan.method,
            "protected": plan.protected,
            "candidates": plan.candidates,
            "parameters": {"intact": before, "dropped": after},
            "replacements": made.replacements,
        },
        summary=_summary(plan, before, after, made.replacements),
        notes=made.notes,
    )


@dataclass(frozen=True)
class _Made:
    """What became of the maps, and what the matrices held that they are folded into."""

    replacements: list[dict[str, Any]]
    notes: list[str]
    changed: list[tuple[nn.Module, dict[str, Tensor]]]

    def take_back(self) -> None:
        for matrix, before in self.changed:
            put_back(matrix, before)


def _replace(stack: DecoderLayers, removed: list[int], batches: Sequence[Batch], measured: bool, made: _Made) -> None:
    """Folds a map for each run of removed layers, of which `measured` keeps those that lower the loss."""
    check_batches(batches)
    try:
        check_writable(stack)
        judge = _Judge(stack, removed, batches) if measured else None
    except ValueError as error:
        made.notes.append(f"no linear maps in the place of layers: {error}")
        return
    replacer = BlockReplacer(stack, removed, batches if judge is None else judge.fitting)
    for block in replacer.blocks:
        try:
            matrix, name, T, explained = replacer.fit(block)
        except ValueError as error:
            made.notes.append(f"no linear map in the place of {block}: {error}")
        else:
            made.changed.append((matrix, put_in(matrix, T)))
            told = {"layers": [*range(block.first, block.last + 1)], "matrix": name, "explained": explained}
            verdict = {"used": True} if judge is None else judge.verdict()
            if not verdict["used"]:
                put_back(*made.changed.pop())
            made.replacements.append({**told, **verdict})
        replacer.skip(block)


class _Judge:
    """Whether maps lower the loss of the model without layers, on samples that no map is fitted to.

    Args:
        stack: the layers.
        removed: which of them are left out.
        batches: the samples.

    Raises:
        ValueError: a single sample; a model that has no loss of its own.
    """

    def __init__(self, stack: DecoderLayers, removed: list[int], batches: Sequence[Batch]) -> None:
        samples = describe_batches(batches)["samples"]
        if samples < 2:
            raise ValueError(f"they need at least two samples, to fit on one and to measure on one, got {samples}")
        self.fitting, self._measuring = split_samples(batches, samples - max(1, round(samples * CHOICE_SHARE)))
        self._metric: Metric = find_metric(None, task_of(stack.model, batches))
        if self._metric.compares:
            raise ValueError(f"{type(stack.model).__name__} has no loss of its own to measure on these batches")
        self._stack, self._removed = stack, removed
        self._least = self._loss()

    def verdict(self) -> dict[str, Any]:
        """Whether the model as it is now is better than all before it, and both losses."""
        loss = {"plain": self._least, "linear": self._loss()}
        self._least = min(loss.values())
        return {"used": loss["linear"] < loss["plain"], "loss": loss}

    def _loss(self) -> float:
        """With what is in the model now: nothing is kept from one call to the next."""
        (found,) = RemovalProbe(self._stack, self._metric, self._measuring).losses([self._removed], "measuring maps")
        return found


def _summary(plan: DepthPlan, before: int, after: int, replacements: list[dict[str, Any]]) -> list[str]:
    removed = ", ".join(map(str, plan.layers))
    why = "as asked for" if plan.method == GIVEN else f"chosen by {plan.method.replace('_', ' ')}"
    found = [
        f"{len(plan.layers)} of {len(plan.parameters)} layers are removed ({removed}), {why}; {after:,} of {before:,} "
        "parameters are left."
    ]
    if plan.protected:
        why = ": massive activations arise there" if plan.protection == MASSIVE else ", as asked for"
        told = "Layer {} was" if len(plan.protected) == 1 else "Layers {} were"
        found.append(f"{told.format(', '.join(map(str, plan.protected)))} protected{why}.")
    if plan.candidates:
        order = sorted(plan.candidates, key=lambda name: plan.candidates[name]["loss"])
        told = ", ".join(f"{name.replace('_', ' ')} {plan.candidates[name]['loss']:.3f}" for name in order)
        found.append(f"Loss on samples that the search did not see: {told}.")
    if replacements:
        used = [entry["matrix"] for entry in replacements if entry["used"]]
        where = f": {', '.join(used)}" if used else ""
        found.append(f"{len(used)} of {len(replacements)} linear maps in the place of layers are kept{where}.")
    return found
