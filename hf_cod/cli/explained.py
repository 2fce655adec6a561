"""Tables of `--explain`: the bits of each layer, the removed layers, and repeated blocks, with scores or costs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hf_cod.cli.terminal import make_console
from hf_cod.compression.depth.depth_plan import DepthPlan
from hf_cod.compression.depth.repeat_plan import RepeatPlan
from hf_cod.compression.quantization.plan import plan_bits
from hf_cod.io.display import terminal_text
from hf_cod.io.report import format_number
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores


def explain_bits(
    stack: DecoderLayers, settings: Any, scores: LayerScores | None, expert_scores: ExpertScores | None
) -> None:
    """Prints the bits and the score of each layer; `settings` are those of hf-cod quantize."""
    plan = plan_bits(stack, settings.bits, settings, scores, settings.skip, expert_scores=expert_scores)
    values = [0.0] * len(stack) if scores is None else scores.values
    order = sorted(range(len(stack)), key=lambda i: -values[i])
    title = f"{plan.stored:.3f} stored bits per weight"
    table = Table(*("layer", "score", "rank", "matrices of four bits", "of three"), title=title)
    for index in range(len(stack)):
        widths = {name: plan.widths(name) for name in plan.names(stack, index)}
        count = sum(map(len, widths.values()))
        four = sum(found.count(4) for found in widths.values())
        named = ", ".join(_of_four_bits(name, found) for name, found in widths.items() if 4 in found)
        told = "all" if four and four == count else named or "none"
        row = (index, format_number(values[index]), order.index(index) + 1, told, count - four)
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
    of_these = "layers"
    if expert_scores is not None:
        why = f"to what all tokens enter first, then to experts by {terminal_text(expert_scores.method)}"
        of_these = "experts"
    console.print(
        f"Four bits are assigned {why}, up to {settings.bits:g} stored bits per weight; the last of these {of_these} "
        "gets them only in the matrices that fit, in the order of the model.",
        highlight=False,
    )


def _of_four_bits(name: str, widths: list[int]) -> str:
    """The end of a matrix's name; for a bank of experts with the number of those that have four bits."""
    end, four = name.rsplit(".", 1)[-1], widths.count(4)
    return end if len(widths) == four else f"{end} ({four} of {len(widths)} experts)"


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


def explain_repetition(plan: RepeatPlan) -> None:
    """Prints the loss of each block that a search tried, best first."""
    before, name = plan.losses["searched"], plan.metric.replace("_", " ")
    table = Table("first layer", "last layer", name, "difference")
    for found in plan.candidates:
        told = format_number(found["loss"]), f"{found['loss'] - before:+.4f}"
        table.add_row(str(found["start"]), str(found["end"] - 1), *told)
    console = make_console()
    console.print(table)
    console.print(
        f"Measured on the samples of the search; {terminal_text(name)} of the intact model: {format_number(before)}.",
        highlight=False,
    )
