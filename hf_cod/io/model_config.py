"""The config.json of a checkpoint, checked before transformers reads it, and errors of building a model from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.utils.hub import cached_file

from hf_cod.io.display import one_line
from hf_cod.io.hub import why_unreachable
from hf_cod.io.reading import naming_file, parse_json, read_text
from hf_cod.io.schema import brief, read_record

# What transformers raises while it builds a config or a model from values of another type or range.
_OF_BUILDING = (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)
CONFIG = "config.json"


@dataclass(frozen=True)
class _Head:
    """Entries of config.json that transformers and hf_cod use before a config class checks the others."""

    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: dict[str, str | list[str | None]] | None = None
    quantization_config: dict[str, Any] | None = None


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The content of a config.json.

    NaN and infinity are accepted, because transformers writes them.

    Raises:
        ValueError: not a JSON object, or its entries that name classes or the quantization have another type; names
            the file.
    """
    text = read_text(path, "model")
    with naming_file(path):
        content = parse_json(text, "model", nan=True)
        if not isinstance(content, dict):
            raise ValueError(f"model: expected named entries, got {brief(content)}")
        read_record(_Head, content, "model", extra=True)
    return content


def find_model_config(source: str | Path, revision: str | None = None, *, local: bool = False) -> str | None:
    """The path of the config.json of a directory or Hub repository; None if there is none.

    Args:
        source: a directory or a Hub id.
        revision: revision on the Hub.
        local: whether only the local cache of the Hub is read.

    Raises:
        OSError: no such repository or revision, or no access to it.
    """
    found: str | None = cached_file(
        source,
        CONFIG,
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def check_model_config(source: str, revision: str | None = None, field: str = "model") -> str | None:
    """Checks the config.json of a directory or Hub repository, if there is one; returns its path.

    Raises:
        ValueError: no such repository, or as `read_model_config`.
    """
    expected = f"{field}: expected a Hub id, a directory with a checkpoint, or a .gguf file, got {source!r}"
    if not Path(source).is_dir():
        why = why_unreachable(source, revision=revision)
        if why is not None:
            raise ValueError(
                f"{expected}: there is no such directory, it is not in the cache of the Hub, and the Hub cannot be "
                f"reached ({why})"
            )
    try:
        path = find_model_config(source, revision)
    except OSError as error:
        raise ValueError(f"{expected}: {one_line(error)}") from error
    if path is not None:
        read_model_config(path)
    return path


@contextmanager
def building(what: str, source: str | Path) -> Iterator[None]:
    """Turns the errors that transformers raises for wrong values in a config into ValueError.

    Only for calls of transformers: an error of this kind in other code is a bug.

    Args:
        what: what was to be built, for errors.
        source: the directory, Hub id or GGUF file that holds the config; named in errors.

    Raises:
        ValueError: "model: expected ..., got ... in 'source': cause".
    """
    try:
        yield
    except _OF_BUILDING as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"model: expected {what}, got {type(error).__name__} in {str(source)!r}: {cause}") from error
