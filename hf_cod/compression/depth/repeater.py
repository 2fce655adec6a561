"""`repeat_layers`: repeats the block of layers of a plan, and reports it."""

from __future__ import annotations

from torch import nn

from hf_cod.compression.depth.depth_plan import GIVEN
from hf_cod.compression.depth.repeat_plan import RepeatPlan
from hf_cod.io.arguments import checked
from hf_cod.io.report import RunReport
from hf_cod.layers.checks import name_of, other_name, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.removal.repeat import repeat
from hf_cod.layers.size import count_parameters
from hf_cod.layers.stack import find_decoder_layers


@for_one_thread
@checked
def repeat_layers(
    model: nn.Module,
    plan: RepeatPlan | tuple[int, int] | int,
    *,
    layers_path: str | None = None,
    name: str | None = None,
) -> RunReport:
    """Repeats a block of layers permanently, as `repeat` does; the result is a stock model.

    The report's `layers` hold `runs` (how often each of the model's layers runs) and `parameters`; its `results` hold
    `order` (the layers in the order in which they run), `criterion`, `blocks` (the candidates), `losses` and `interval`
    of the plan, and `parameters` of the full model before and after.

    Args:
        model: a transformers model, wrapped or not.
        plan: from `plan_repeat`; or a block that runs twice, as (start, end), or one layer.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.

    Raises:
        ValueError: a plan for another model, a block that does not exist; see also `repeat`. The model is unchanged in
            these cases.
    """
    stack = find_decoder_layers(model, layers_path)
    if not isinstance(plan, RepeatPlan):
        start, end = (plan, plan + 1) if isinstance(plan, int) else plan
        plan = RepeatPlan(name_of(stack), start, end, sizes_of(stack))
    plan.check(stack)
    before, environment, source = count_parameters(stack.model), environment_of(stack.model), name_of(stack)
    notes = other_name("plan", plan.model, stack)
    repeat(model, plan.start, plan.end, plan.times, layers_path)
    after = count_parameters(stack.model)
    how = "as given" if plan.criterion == GIVEN else "selected by search"
    told = (
        f"Layers {', '.join(map(str, range(plan.start, plan.end)))} run {plan.times} times, {how}: {len(plan.order)} "
        f"layers instead of {plan.depth}, and {after:,} parameters instead of {before:,}."
    )
    return RunReport(
        kind="repeat-layers",
        model=name or source,
        settings={"criterion": plan.criterion, "times": plan.times},
        environment=environment,
        layers={"runs": [plan.order.count(i) for i in range(plan.depth)], "parameters": plan.parameters},
        results={
            "order": plan.order,
            "criterion": plan.criterion,
            "blocks": plan.candidates,
            "losses": plan.losses,
            "interval": plan.interval,
            "parameters": {"intact": before, "repeated": after},
        },
        summary=[told, *plan.summary()],
        notes=notes,
    )
