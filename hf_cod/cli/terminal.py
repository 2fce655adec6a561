"""Reports as tables in the terminal, and whatever else names models and files there.

Such names come from strangers: they are shown as they are, control characters as escapes, and rich's markup is text.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from hf_cod.io.display import terminal_text
from hf_cod.io.report import RunReport, format_number
from hf_cod.reporting.comparison import Comparison

# Measures that only report.md shows: with them the table would not fit 80 columns.
ONLY_ON_THE_PAGE = ("mean", "max_abs")


def console() -> Console:
    """A console that takes markup and names of emoji for the text that they are."""
    return Console(markup=False, emoji=False)


def print_report(report: RunReport) -> None:
    """Prints the per-layer table, then the findings and notes."""
    shown = console()
    layers = {name: values for name, values in report.layers.items() if name not in ONLY_ON_THE_PAGE}
    table = Table(
        title=terminal_text(f"{report.kind}: {report.model}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("layer", *layers):
        table.add_column(terminal_text(name).replace("_", "\n"), justify="right", no_wrap=True)
    for i in range(report.n_layers):
        table.add_row(str(i), *[format_number(values[i]) for values in layers.values()])
    if layers:
        shown.print(table)
    for line in report.summary:
        shown.print(f"• {terminal_text(line)}", highlight=False)
    for note in report.notes:
        shown.print(f"note: {terminal_text(note)}", style="dim", highlight=False)


def print_comparison(comparison: Comparison) -> None:
    """Prints the table of several runs, then what sets them apart."""
    shown = console()
    table = Table(*map(terminal_text, comparison.columns))
    for row in comparison.rows:
        table.add_row(*map(terminal_text, row))
    shown.print(table)
    for sentence in comparison.verdict:
        shown.print(f"• {terminal_text(sentence)}", highlight=False)
