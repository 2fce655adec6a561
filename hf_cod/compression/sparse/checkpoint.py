"""Checks the files of a packed checkpoint against its config before loading: transformers would initialize missing
tensors with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hf_cod.io.reading import open_tensors

PARTS = ("mask", "values", "row_starts")
FLOATS = ("F64", "F32", "F16", "BF16")


def check_files(files: Iterable[str], modules: Mapping[str, int]) -> None:
    """Checks that the files hold exactly the packed matrices that the config records, each complete.

    Args:
        files: the checkpoint's safetensors files.
        modules: name -> number of stored weights, as recorded.

    Raises:
        ValueError: an unreadable file, a missing part of a matrix or one of another dtype or shape, a matrix that is
            not recorded, or a recorded matrix that is missing; names the matrix or the file.
    """
    if not modules:
        raise ValueError("modules: expected the names of packed matrices in config.json, got none")
    found = _packed(files)
    for name, parts in sorted(found.items()):
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise ValueError(f"{name}: expected {', '.join(PARTS)} in the files, got none of {', '.join(missing)}")
        kind, shape = parts["values"]
        if kind not in FLOATS:
            raise ValueError(f"{name}: expected values of floating point, got {kind}; the file is damaged")
        # In families whose tensor names differ between files and model, only the number of matrices is compared.
        if name in modules and shape != [modules[name]]:
            raise ValueError(f"{name}: expected {modules[name]} values as config.json says, got {shape}")
    if len(found) != len(modules):
        name = min(set(found) ^ set(modules))
        there, lacking = ("files", "config.json") if name in found else ("config.json", "files")
        raise ValueError(
            f"{name}: expected a packed matrix in files and config.json, got one in {there}, none in {lacking}"
        )


def _packed(files: Iterable[str]) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Name -> part -> (dtype in safetensors' notation, shape) of each candidate for a packed matrix."""
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for path in files:
        with open_tensors(path, "weights", "a complete safetensors file") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, part = key.rpartition(".")
                if part in PARTS:
                    tensor = file.get_slice(key)
                    found.setdefault(name, {})[part] = (tensor.get_dtype(), tensor.get_shape())
    # Other kinds of modules may have a buffer named mask, too.
    return {name: parts for name, parts in found.items() if len(parts) > 1 or "row_starts" in parts}
