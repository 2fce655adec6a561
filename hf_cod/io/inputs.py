"""Inputs that are given by a path: what the path alone tells.

Imports neither torch nor transformers, so that the command line reports a wrong path before it loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_cod.io.files import looks_local
from hf_cod.io.schema import brief

# Suffixes of plain text; suffix of a local file -> reader of `datasets`.
PLAIN_TEXT = (".txt", ".md", ".text", "")
FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
REPORT, HISTORY = "report.json", "history.jsonl"
KNOWN_ENDINGS = (*PLAIN_TEXT[:-1], *FILE_READERS)


def check_model_path(name: str, field: str = "model") -> None:
    """Checks the path of a model; names that may be Hub ids pass.

    Raises:
        ValueError: there is no such GGUF file, the path is another file, or it does not exist and is no Hub id.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{field}: expected a GGUF file, got {name!r}, which does not exist")
    elif path.is_file():
        raise ValueError(
            f"{field}: expected a directory or a .gguf file, got {name!r}; pass the directory that holds it"
        )
    elif not path.exists() and looks_local(name):
        raise ValueError(f"{field}: expected a Hub id, a directory or a .gguf file, got {name!r}, which does not exist")


def check_text_path(name: str, field: str = "text") -> None:
    """Checks the path of a text; names that may be datasets pass.

    Raises:
        ValueError: the file has an unknown ending, or the path does not exist and is no dataset name.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in (*PLAIN_TEXT, *FILE_READERS):
        raise ValueError(f"{field}: expected a file that ends in {', '.join(KNOWN_ENDINGS)}, got {name!r}")
    if not path.exists() and (path.suffix in KNOWN_ENDINGS or looks_local(name)):
        raise ValueError(f"{field}: expected a text file or a dataset name, got {name!r}, which does not exist")


def check_file(path: str | Path, field: str, what: str = "a file") -> None:
    """Checks that a path exists and is not a directory; it may be a pipe.

    Raises:
        ValueError: it does not exist, or it is a directory.
    """
    if Path(path).is_dir() or not Path(path).exists():
        got = "is a directory" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{field}: expected {what}, got {str(path)!r}, which {got}")


def check_run(path: str | Path, field: str) -> None:
    """Checks that a path is a report.json, or the directory of a run that has one.

    Raises:
        ValueError: it does not exist, or it has none.
    """
    path = Path(path)
    if not (path / REPORT if path.is_dir() else path).is_file():
        raise ValueError(f"{field}: expected a directory with a {REPORT}, or such a file, got {_what(path, REPORT)}")


def check_run_directory(path: str | Path, field: str) -> None:
    """Checks that a path is the output directory of a command, or one inside of it.

    Raises:
        ValueError: it is no directory, or there is no report.
    """
    path = Path(path)
    if not path.is_dir() or not any((place / REPORT).is_file() for place in (path, path.resolve().parent)):
        raise ValueError(f"{field}: expected the output directory of a command, got {_what(path, REPORT)}")


def check_history(path: str | Path, field: str) -> None:
    """Checks that a path is the history of a training, its directory, or the output directory of the training.

    Raises:
        ValueError: it does not exist, or it has none.
    """
    path = Path(path)
    found = [*path.glob(HISTORY), *path.glob(f"*/{HISTORY}")] if path.is_dir() else [path]
    if not any(file.is_file() for file in found):
        raise ValueError(f"{field}: expected a training history of hf_cod, got {_what(path, HISTORY)}")


def _what(path: Path, lacks: str) -> str:
    """A path and what it is, for an error."""
    kind = "is a file" if path.is_file() else "is no file"
    got = f"has no {lacks}" if path.is_dir() else kind if path.exists() else "does not exist"
    return f"{str(path)!r}, which {got}"


def check_inputs(values: Mapping[str, Any]) -> None:
    """Checks those options and arguments of a command that name inputs: models, texts, scores, statistics, plans
    and runs.

    Args:
        values: name -> value, or a list of values; None is not checked.

    Raises:
        ValueError: one of them cannot be an input; names it.
    """
    for name, check in CHECKS.items():
        given = values.get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is None:
                continue
            try:
                check(value, name)
            except OSError as error:  # a name that is too long, or a directory that may not be read
                raise ValueError(f"{name}: expected a path, got {brief(value)}: {error.strerror}") from error


# Option or argument of the commands -> check of its path.
CHECKS: dict[str, Callable[[str, str], None]] = {
    **dict.fromkeys(("model", "student", "teacher", "source", "swap"), check_model_path),
    **dict.fromkeys(("text", "eval_text"), check_text_path),
    **dict.fromkeys(("scores", "plan", "chat_template"), check_file),
    "run": check_history,
    "runs": check_run,
    "statistics": partial(check_file, what="a file of statistics"),
}
