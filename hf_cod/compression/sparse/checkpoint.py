"""What the files of a packed checkpoint hold, compared with what its config says, before anything is loaded:
transformers fills what is missing with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safetensors import SafetensorError, safe_open

PARTS = ("mask", "values", "row_starts")
FLOATS = ("F64", "F32", "F16", "BF16")


def check_files(files: Iterable[str], modules: Mapping[str, int]) -> None:
    """Makes sure that the files hold each packed matrix that the config records, whole, and no other.

    Args:
        files: the checkpoint's safetensors files.
        modules: name -> number of stored weights, as recorded.

    Raises:
        ValueError: a file that cannot be read, a part of a matrix that is missing or of another kind, a matrix without
            record or a record without matrix; begins with the name of the matrix or the file.
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
        # Families whose tensors have other names in files than in the model are compared by their number alone.
        if name in modules and shape != [modules[name]]:
            raise ValueError(f"{name}: expected {modules[name]} values as config.json says, got {shape}")
    if len(found) != len(modules):
        name = min(set(found) ^ set(modules))
        there, lacking = ("files", "config.json") if name in found else ("config.json", "files")
        raise ValueError(
            f"{name}: expected a packed matrix in files and config.json, got one in {there}, none in {lacking}"
        )


def _packed(files: Iterable[str]) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Name -> part -> (dtype as safetensors calls it, shape) of whatever looks like a packed matrix."""
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    name, _, part = key.rpartition(".")
                    if part in PARTS:
                        tensor = file.get_slice(key)
                        found.setdefault(name, {})[part] = (tensor.get_dtype(), tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: expected a whole safetensors file, got one that breaks off: {error}") from error
    # A buffer of another kind of module may be called mask, too.
    return {name: parts for name, parts in found.items() if len(parts) > 1 or "row_starts" in parts}
