"""Journals that somebody edited, with checksums that are right."""

import json

from safetensors import safe_open
from safetensors.torch import load_file

from hf_cod.io.reading import checksum
from hf_cod.io.tensors import save_tensors


def forge(path, change, only=""):
    """Changes each result of a journal whose key begins with `only`, and computes its checksum again."""
    lines = []
    for line in path.read_text().splitlines():
        work, key, value = json.loads(line)[:3]
        record = json.dumps([work, key, change(value) if key.startswith(only) else value])
        lines.append(f'{record[:-1]}, "{checksum(record)}"]\n')
    path.write_text("".join(lines))


def forge_layer(path, tensors=lambda found: found, note=lambda found: found):
    """Changes the tensors of a finished layer or its note, and computes its checksum again."""
    with safe_open(path, "pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key in ("note", "work", "layer")}
    metadata["note"] = json.dumps(note(json.loads(metadata["note"])))
    save_tensors(path, tensors(load_file(path)), metadata, checked=True)


def with_first_number(value, number):
    """A copy of nested dicts and lists with another first number."""
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: with_first_number(value[first], number)}
    return [with_first_number(value[0], number), *value[1:]] if isinstance(value, list) else number
