"""Which measures of `diagnose` a model supports."""

from __future__ import annotations

from hf_cod.analysis.diagnostics.gradients import why_no_gradients
from hf_cod.analysis.diagnostics.settings import METRICS, MORE_METRICS, DiagnoseSettings
from hf_cod.io.report import RunReport
from hf_cod.io.text import Batch
from hf_cod.layers.direct_use import check_unwritten, direct_use
from hf_cod.layers.independence import check_independent
from hf_cod.layers.layer_calls import REPEATED, layers_obstacle
from hf_cod.layers.stack import DecoderLayers


def applicable(
    chosen: DiagnoseSettings, stack: DecoderLayers, task: str, batches: list[Batch], report: RunReport
) -> list[str]:
    """Names of the measures to compute; notes of the report name those that the model does not support."""
    if chosen.metrics is not None and chosen.by_name:
        return chosen.metrics
    reasons = {"gradient_norm": why_no_gradients(stack, task, batches), "layer_drop": _why_dependent(stack, batches)}
    report.notes.extend(f"{metric} was left out: {reason}" for metric, reason in reasons.items() if reason is not None)
    found = [metric for metric in METRICS if reasons.get(metric) is None]
    found = [metric for metric in found if chosen.everything or metric not in MORE_METRICS]
    return [metric for metric in found if metric != "generation" or chosen.tasks]


def _why_dependent(stack: DecoderLayers, batches: list[Batch]) -> str | None:
    """Why layers cannot be run without the earlier ones, or the model without one of them; None if they can."""
    try:
        check_independent(stack, "layers", batches)
        check_unwritten(stack.model, batches)
    except ValueError as error:
        return str(error).partition(": ")[2]
    obstacles = direct_use(stack.model, batches).obstacles
    return layers_obstacle(stack, {name: why for name, why in obstacles.items() if why != REPEATED})
