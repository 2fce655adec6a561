"""Rows of datasets and of local files that `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_cod.io.display import one_line
from hf_cod.io.hub import why_unreachable
from hf_cod.io.inputs import FILE_READERS, PLAIN_TEXT
from hf_cod.io.reading import read_text
from hf_cod.io.records import Format, Record, find_format, records_of
from hf_cod.io.settings import TextSettings, check_effect

CHUNK = 1 << 20  # bytes searched at a time


def read_rows(settings: TextSettings) -> tuple[Iterable[str | Record], Format]:
    """The texts or records of a dataset or of a local file that `datasets` reads, and their format.

    Raises:
        ValueError: no such file or dataset, no such column, columns of several formats, or a chat template beside plain
            text, in all rows or in the first.
        ImportError: `datasets` is not installed.
    """
    rows = load_rows(settings, plain=False)
    columns = rows.column_names
    if columns is None:  # of a stream, they may be unknown before the first row
        columns = [*next(_read(rows, settings), {settings.text_column: ""})]
    chosen = find_format(columns, settings.text_column)
    if chosen.name == "text":
        check_effect(settings, ["chat_template"], "plain text")
        return column_of(rows, settings), chosen
    named, template = settings.text_column in columns, _template(settings)
    if template is not None:
        first = next(records_of(_read(rows, settings), chosen, template, named), None)
        if isinstance(first, str) or (first is not None and isinstance(first.prompt, str)):
            check_effect(settings, ["chat_template"], f"{chosen.name} of plain text")
    return records_of(_read(rows, settings), chosen, template, named), chosen


def text_notes(settings: TextSettings) -> list[str]:
    """What a text was read as, and columns that were not read; empty for plain text that is all there is."""
    source = settings.text
    if source is None or (Path(source).is_file() and Path(source).suffix in PLAIN_TEXT):
        return []
    return read_rows(settings)[1].told()


def _template(settings: TextSettings) -> str | None:
    return None if settings.chat_template is None else read_text(Path(settings.chat_template), "chat_template")


def load_rows(settings: TextSettings, plain: bool = True) -> Any:
    """The rows of a dataset (streamed) or of a local file that `datasets` reads.

    Args:
        settings: the source.
        plain: whether only plain text is accepted.

    Raises:
        ValueError: no source given, no such file or dataset, or no such column.
        ImportError: `datasets` is not installed.
    """
    source = settings.text
    if source is None:
        raise ValueError("text: expected a dataset name or a file of rows, got none")
    path = Path(source)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"text: {source!r} requires the datasets package: pip install 'hf_cod[data]'") from error
    if not path.exists():
        why = why_unreachable(source, "README.md", kind="dataset")
        if why is not None:
            raise ValueError(
                f"text: expected a text file or a dataset name, got {source!r}: there is no such file, it is not in "
                f"the cache of the Hub, and the Hub cannot be reached ({why})"
            )
    if path.is_file() and path.suffix in FILE_READERS and path.suffix != ".parquet":
        check_no_nul(path)
    try:
        if path.is_file() and path.suffix in FILE_READERS:
            options = {"sep": "\t"} if path.suffix == ".tsv" else {}
            rows = datasets.load_dataset(FILE_READERS[path.suffix], data_files=str(path), split="train", **options)
        else:
            rows = datasets.load_dataset(source, settings.text_config, split=settings.text_split, streaming=True)
    except StopIteration as error:  # what datasets raises for an empty file
        raise ValueError(f"text: expected a text file or a dataset name, got {source!r}, which has no rows") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = one_line(error.__cause__ or error)  # datasets' own message does not give the reason
        raise ValueError(f"text: expected a text file or a dataset name, got {source!r}: {cause}") from error
    if plain and rows.column_names is not None and settings.text_column not in rows.column_names:
        raise ValueError(f"text_column: expected one of {', '.join(rows.column_names)}, got {settings.text_column!r}")
    return rows


def column_of(rows: Any, settings: TextSettings) -> Iterator[str]:
    """The texts of the rows; files that turn out to be of another kind while they are streamed are an error."""
    for row in _read(rows, settings):
        if settings.text_column not in row:  # the columns of a stream may be unknown before the first row
            raise ValueError(f"text_column: expected one of {', '.join(row)}, got {settings.text_column!r}")
        yield row[settings.text_column]


def _read(rows: Any, settings: TextSettings) -> Iterator[Any]:
    from datasets.exceptions import DatasetsError

    try:
        yield from rows
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"text: expected files of rows that datasets reads, got {settings.text!r}: {one_line(error)}"
        ) from error


def check_no_nul(path: Path) -> None:
    """Checks that a text file has no NUL bytes: readers truncate a line at NUL, or read it as a character.

    Raises:
        ValueError: it has one, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, chunk in enumerate(iter(lambda: file.read(CHUNK), b"")):
                place = chunk.find(b"\0")
                if place >= 0:
                    raise ValueError(
                        f"text: expected text, got a NUL byte at {number * CHUNK + place} in {str(path)!r}, which is a "
                        "binary file or not in UTF-8"
                    )
    except OSError as error:
        raise ValueError(f"text: expected a file that can be read, got {str(path)!r}: {one_line(error)}") from error
