"""Reports as tables in the terminal.

Names of models and files are of foreign origin: control characters are escaped, and the markup of rich is not applied.
"""

from __future__ import annotations

import os
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from hf_cod.io.display import terminal_text
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.report_columns import legend
from hf_cod.reporting.comparison import Comparison
from hf_cod.reporting.plan_comparison import PlanComparison

# Measures that are shown in report.md only: with them the table would not fit into 80 columns.
ONLY_ON_THE_PAGE = ("mean", "max_abs")
# Width for files and pipes, where no line is wrapped and no cell is cut.
UNLIMITED = 100_000


def make_console() -> Console:
    """A console on standard output, as wide as the terminal or, without one, unlimited.

    Without styles if NO_COLOR is set. Markup and emoji names are printed literally.
    """
    width = None if sys.stdout.isatty() else UNLIMITED
    return Console(width=width, color_system=None if os.environ.get("NO_COLOR") else "auto", markup=False, emoji=False)


def print_report(report: RunReport) -> None:
    """Prints the per-layer table, then summary and notes."""
    console = make_console()
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
        console.print(table)
        for meaning in legend(layers):
            console.print(meaning, style="dim", highlight=False)
        console.print()
    for line in report.summary:
        console.print(f"• {terminal_text(line)}", highlight=False)
    for note in report.notes:
        console.print(f"note: {terminal_text(note)}", style="dim", highlight=False)


def print_comparison(comparison: Comparison | PlanComparison) -> None:
    """Prints the table of several runs, scores or plans, then the verdict."""
    console = make_console()
    table = Table(*map(terminal_text, comparison.columns))
    for row in comparison.rows:
        table.add_row(*map(terminal_text, row))
    console.print(table)
    for sentence in comparison.verdict:
        console.print(f"• {terminal_text(sentence)}", highlight=False)
