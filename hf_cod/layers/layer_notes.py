"""Checks of the notes of `FinishedLayers`, which may be another one's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from hf_cod.io.schema import brief, check_value, limits

# Range of an error as a share of energy: negative by rounding alone; coarse methods lose more than all of it.
LEAST, MOST = -1e-3, 1e3


class NamedErrors(TypedDict):
    """A layer's note.

    Attributes:
        errors: name of a matrix -> its error.
        unseen: matrices that received no tokens.
    """

    errors: dict[str, float]
    unseen: list[str]


class ListedErrors(TypedDict):
    """A layer's note, with errors in the order of its matrices."""

    errors: list[float]
    unseen: list[str]


def check_no_note(note: Any) -> None:
    """Checks the note of a layer that is only measured."""
    check_value(note, type(None), "note")


def check_unseen(unseen: Any, names: Sequence[str], measured: bool) -> None:
    """Checks a list of matrices that received no tokens.

    Args:
        unseen: the list; a matrix of a bank of experts is named after the bank and its number.
        names: the layer's matrices and banks.
        measured: whether the layer was run; else there are none.

    Raises:
        ValueError: it is no list of such names.
    """
    for name in check_value(unseen, list[str], "unseen"):
        bank, _, number = name.rpartition(".")
        if not measured or (name not in names and not (bank in names and number.isdecimal())):
            raise ValueError(f"unseen: expected {'matrices of this layer' if measured else 'none'}, got {brief(name)}")


def check_errors(note: Any, kind: Any, names: Sequence[str], measured: bool, without_tokens: bool = False) -> None:
    """Checks a note with errors.

    Args:
        note: the note.
        kind: `NamedErrors` or `ListedErrors`.
        names: the layer's matrices that were changed.
        measured: whether the layer was run, by which errors are measured.
        without_tokens: whether there are errors also of matrices that received no tokens.

    Raises:
        ValueError: it is no such note, or has errors of other matrices.
    """
    found = check_value(note, kind, "note", limits(least=LEAST, most=MOST))
    check_unseen(found["unseen"], names, measured)
    expected = [n for n in names if without_tokens or (measured and n not in found["unseen"])]
    errors = found["errors"]
    if len(errors) != len(expected) or (isinstance(errors, dict) and errors.keys() != set(expected)):
        got = f"{len(errors)} ({brief(errors)})"
        raise ValueError(f"errors: expected {len(expected)}, those of {brief(', '.join(expected))}, got {got}")
