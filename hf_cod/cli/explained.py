"""Tables of `--explain`: the bits of each layer, and the removed layers, with their scores or costs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hf_cod.cli.terminal import make_console
from hf_cod.compression.depth.depth_plan import DepthPlan
from hf_cod.compression.quantization.plan import plan_bits
from hf_cod.io.display import terminal_text
from hf_cod.io.report import format_number
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores


def explain_bits(stack: DecoderLayers, settings: Any, scores: LayerScores | None) -> None:
    """Prints the bits and the score of each layer; `settings` are those of hf-cod quantize."""
    plan = plan_bits(stack, settings.bits, settings, scores, settings.skip)
    values = [0.0] * len(stack) if scores is None else scores.values
    order = sorted(range(len(stack)), key=lambda i: -values[i])
    title = f"{plan.stored:.3f} stored bits per weight"
    table = Table(*("layer", "score", "rank", "matrices of four bits", "of three"), title=title)
    for index in range(len(stack)):
        names = [name for name in stack.linears(index) if name in plan.bits]
        four = [name.rsplit(".", 1)[-1] for name in names if plan.bits[name] == 4]
        told = "all" if four and len(four) == len(names) else ", ".join(four) or "none"
        row = (index, format_number(values[index]), order.index(index) + 1, told, len(names) - len(four))
        table.add_row(*map(terminal_text, row))
    console = make_console()
    console.print(table)
    if not settings.mixed:
        return
    why = (
        "by equal scores, earlier layers first"
        if scores is None
        else f"by {terminal_text(scores.method)}, highest scores first"
    )
    console.print(
        f"Four bits are assigned {why}, up to {settings.bits:g} stored bits per weight; the last of these layers gets "
        "them only in the matrices that fit, in the order of the model.",
        highlight=False,
    )


def explain_depth(plan: DepthPlan) -> None:
    """Prints the cost of each layer, and the removed layers."""
    table = Table("layer", "cost", "rank", "", title=f"{len(plan.layers)} of {len(plan.parameters)} layers")
    known = {i: cost for i, cost in enumerate(plan.costs) if cost is not None}
    order = sorted(known, key=lambda i: known[i])
    for index in range(len(plan.parameters)):
        told = "removed" if index in plan.layers else "protected" if index in plan.protected else ""
        rank = str(order.index(index) + 1) if index in known else "-"
        table.add_row(str(index), format_number(known.get(index)), rank, told)
    console = make_console()
    console.print(table)
    for name, found in plan.candidates.items():
        layers = ", ".join(map(str, found["layers"])) or "none"
        maps = ", replaced by linear maps," if found.get("maps") else ""
        told = f"{name}: without layers {layers}{maps} the {plan.metric} is {format_number(found['loss'])}"
        console.print(terminal_text(told), highlight=False)
