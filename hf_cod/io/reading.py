"""Reading of files: JSON, JSON lines, YAML, safetensors and torch states, each checked before use.

For any file content, the result is plain data or a ValueError "field: expected ..., got ... in 'file'". Types and
ranges are checked by `schema.py` and by the caller.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_cod.io.display import first_line, one_line
from hf_cod.io.schema import brief

# Far larger than any file that hf_cod writes; reading a larger file would only fill the memory.
MOST_BYTES = 1 << 30
# Enough for any count, seed or size in our files, and for 10 ** 30, which transformers writes for "no limit"; parsing
# takes time quadratic in the number of digits.
MOST_DIGITS = 40
# Deeper than any value in our files; recursive functions stay within the stack.
MOST_DEPTH = 60


class _NoFileError(ValueError):
    """There is no file that can be read; the message names its path."""


def read_json(path: str | Path, field: str, most: int = MOST_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: no such file, a file that is too large or too deeply nested, or content that is not strict JSON in
            UTF-8 (NaN, numbers beyond the range of floats and repeated names are refused).
    """
    with naming_file(path):
        return parse_json(_read_text(Path(path), field, most), field)


def read_json_lines(path: str | Path, field: str, most: int = MOST_BYTES, nan: bool = False) -> list[Any]:
    """The content of each line of a JSON lines file; an incomplete last line (no line end) is left out.

    Raises:
        ValueError: as `read_json`; names the line.
    """
    with naming_file(path):
        lines = _read_text(Path(path), field, most).split("\n")[:-1]
        return [parse_json(line, f"{field} line {number}", nan) for number, line in enumerate(lines, 1)]


def checksum(line: str) -> str:
    """The checksum of one JSON line, which detects damage, but not an intended change."""
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def parse_json(text: str, field: str, nan: bool = False) -> Any:
    """Parses strict JSON; with `nan`, NaN and infinity are accepted.

    Raises:
        ValueError: the text is not strict JSON.
    """

    def constant(name: str) -> float:
        if nan:
            return float(name)
        raise ValueError(f"{field}: expected finite numbers, got {name}")

    def number(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            raise ValueError(f"{field}: expected finite numbers, got {digits[:MOST_DIGITS]}")
        return found

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"{field}: expected numbers of at most {MOST_DIGITS} digits, got {len(digits)}")
        return int(digits)

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{field}: expected each name once, got {brief(twice)} twice")
        return found

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=whole, object_pairs_hook=entries
        )
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except json.JSONDecodeError as error:
        got = "an empty text" if not text.strip() else f"other text: {error}"
        raise ValueError(f"{field}: expected JSON, got {got}") from error
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"{field}: expected JSON, got {error}") from error
    if text.count("[") + text.count("{") > MOST_DEPTH and _depth(found) > MOST_DEPTH:
        raise ValueError(f"{field}: expected at most {MOST_DEPTH} levels of nesting, got more")
    return found


def as_read(value: Any) -> Any:
    """A JSON-like value as it would be read from a file: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def read_yaml(path: str | Path, field: str, most: int = MOST_BYTES) -> Any:
    """The content of a YAML file. Numbers and dates are text, as they are written.

    YAML 1.1 would read 010 as 8, 1:30 as 90, and the name of a commit such as 0123456 as 42798.

    Raises:
        ValueError: no such file, a file that is too large, or content that is not YAML in UTF-8 (repeated names are
            refused).
    """
    import yaml

    numbers = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in known if tag not in numbers]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [(name.tag, name.value) for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"the name {brief(name[1])} twice")
            return super().construct_mapping(node, deep)

    with naming_file(path):
        text = _read_text(Path(path), field, most)
        try:
            return yaml.load(text, Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an explicit tag of other text
            raise ValueError(f"{field}: expected YAML, got {first_line(error)}") from error


def _depth(value: Any) -> int:
    """Levels of nested lists and dicts."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Adds the file name to a ValueError about the content of a file."""
    try:
        yield
    except _NoFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{error} in {str(path)!r}") from error


def take_format(content: Any, expected: int, field: str) -> dict[str, Any]:
    """The entries of a file without "format", which is checked.

    Raises:
        ValueError: the content is not a JSON object, or has another format version.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{field}: expected named entries, got {brief(content)}")
    entries = dict(content)
    version = entries.pop("format", None)
    if type(version) is not int or version != expected:
        raise ValueError(f"{field}: expected format {expected}, got {'none' if version is None else brief(version)}")
    return entries


@contextmanager
def open_tensors(path: str | Path, field: str, what: str) -> Iterator[Any]:
    """Opens a file with `safetensors.safe_open`, which checks the header before it allocates memory.

    Args:
        path: the file.
        field: the field name at the start of errors.
        what: the expected kind of file, for errors.

    Raises:
        ValueError: the file cannot be opened or read, or is truncated.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        got = "is a directory" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{field}: expected {what}, got {str(path)!r}, which {got}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{field}: expected {what}, got {str(path)!r}: {one_line(error)}") from error


def read_state(path: str | Path, field: str) -> Any:
    """The content of a torch state file, memory-mapped; no code in it is executed.

    Raises:
        ValueError: no such file, or content other than tensors and plain values.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive, or a pickle that would run code, may raise anything
        raise ValueError(f"{field}: expected a torch state file, got {first_line(error)}") from error


def read_text(path: str | Path, field: str, most: int = MOST_BYTES, errors: str = "strict") -> str:
    """The content of a text file; `errors` as in `bytes.decode`.

    Raises:
        ValueError: no such file, a file that is too large, or text that is not UTF-8; names the file.
    """
    with naming_file(path):
        return _read_text(Path(path), field, most, errors)


def read_bytes(path: str | Path, field: str) -> bytes:
    """The content of a file, of any size.

    Raises:
        ValueError: no such file, or one that cannot be read; names the file.
    """
    with naming_file(path):
        return _read_bytes(Path(path), field, None)


def _read_text(path: Path, field: str, most: int, errors: str = "strict") -> str:
    try:
        return _read_bytes(path, field, most).decode(errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: expected text in UTF-8, got {error}") from error


def _read_bytes(path: Path, field: str, most: int | None) -> bytes:
    try:
        if path.is_dir():
            raise _NoFileError(f"{field}: expected a file, got {str(path)!r}, which is a directory")
        size = path.stat().st_size
        if most is not None and size > most:
            raise ValueError(f"{field}: expected at most {most:,} bytes, got {size:,}")
        with path.open("rb") as file:
            raw = file.read(None if most is None else most + 1)  # a pipe or a device has no size
        if most is not None and len(raw) > most:
            raise ValueError(f"{field}: expected at most {most:,} bytes, got more")
        return raw
    except FileNotFoundError as error:
        raise _NoFileError(f"{field}: expected a file, got {str(path)!r}, which does not exist") from error
    except OSError as error:
        raise _NoFileError(f"{field}: expected a file, got {str(path)!r}: {error.strerror or error}") from error
