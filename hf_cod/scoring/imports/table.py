"""A table of modules and numbers: CSV with two columns, with or without a first line of names."""

from __future__ import annotations

import csv

from hf_cod.io.schema import brief
from hf_cod.scoring.imports.numbers import NamedNumbers, number_of

SOURCE = "table"


def table(text: str) -> NamedNumbers:
    """Reads the lines "module,number".

    Raises:
        ValueError: a line with other than two columns, without a finite number, or of a module named before.
    """
    values: dict[str, float] = {}
    rows = [(place, row) for place, row in enumerate(csv.reader(text.splitlines()), 1) if row]
    for place, row in rows:
        if len(row) != 2:
            raise ValueError(f"line {place}: expected module,number, got {brief(','.join(row))}")
        name, number = (cell.strip() for cell in row)
        value = _parsed(number)
        if value is None and place == rows[0][0]:
            continue  # names of the columns
        if name in values:
            raise ValueError(f"line {place}: expected each module once, got {name!r} again")
        values[name] = number_of(number if value is None else value, f"line {place}")
    return NamedNumbers(SOURCE, values)


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
