"""Output directories of commands: where in one the model is, and adapters in place of a model.

A model is in the output directory itself. `finetune` also saves adapters: of a base with plain weights in `adapter`,
beside the merged model; of a quantized base in the directory itself, in place of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from hf_cod.io.arguments import described, matches
from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.display import first_line, one_line
from hf_cod.io.model_config import CONFIG
from hf_cod.io.reading import naming_file, open_tensors, read_json
from hf_cod.io.schema import brief, read_record

ADAPTER = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Where a model may be in an output directory: in itself, before 0.2 in `model`, an adapter also in `adapter`.
PLACES = (".", "model", "adapter")
MARKS = (CONFIG, ADAPTER)
SHOWN_ERROR = 200  # characters of an error of PEFT


@dataclass(frozen=True)
class _Head:
    """Entries of adapter_config.json that loading depends on."""

    base_model_name_or_path: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, str | None] | None = None


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises:
        ValueError: not a JSON object, or its entries that loading depends on have another type; names the file.
    """
    content: dict[str, Any] = read_json(path, "adapter")
    with naming_file(path):
        read_record(_Head, content, "adapter", extra=True)
    return content


def places(directory: str | Path) -> list[Path]:
    """The directories of a run (itself first, then `model` and `adapter` in it) that hold a model or an adapter."""
    found = [Path(directory) / place for place in PLACES]
    return [place for place in found if any((place / mark).is_file() for mark in MARKS)]


def check_adapter_files(directory: Path) -> None:
    """Checks that a directory without a model has both files of an adapter, or none.

    Raises:
        ValueError: one of them is missing; says which.
    """
    if (directory / CONFIG).is_file():
        return
    weights = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if weights and not (directory / ADAPTER).is_file():
        missing, found = ADAPTER, weights
    elif (directory / ADAPTER).is_file() and not weights:
        missing, found = WEIGHTS[0], ADAPTER
    else:
        return
    raise ValueError(
        f"model: expected {missing} next to {found}, got none in {str(directory)!r}; copy it there, or save the "
        "adapter again with save_pretrained"
    )


def base_of(directory: str | Path) -> str | None:
    """The base model of the adapter in a directory; None if there is a model, or no adapter.

    Raises:
        ValueError: the adapter's configuration names no base, or another adapter.
    """
    if not _is_adapter(directory):
        return None
    path = Path(directory) / ADAPTER
    base: str | None = read_adapter_config(path).get("base_model_name_or_path")
    with naming_file(path):
        if not base:
            raise ValueError(f"base_model_name_or_path: expected the base model of the adapter, got {brief(base)}")
        if any(map(_is_adapter, places(base)[:1])):
            raise ValueError(f"base_model_name_or_path: expected a model, got another adapter in {base!r}")
    return base


def _is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter in place of a model."""
    return (Path(directory) / ADAPTER).is_file() and not (Path(directory) / CONFIG).is_file()


def with_adapter(base: nn.Module, directory: str | Path) -> nn.Module:
    """The base with its adapter: merged, or, if the base is quantized, as a PEFT model.

    Raises:
        ValueError: an adapter that PEFT cannot load, weights of another one, or none that can be merged (prompt
            tuning).
        ImportError: peft is not installed; the message gives the pip command.
    """
    try:
        with advice_silenced():  # of bitsandbytes, which is imported with PEFT
            from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            f"model: the adapter in {str(directory)!r} requires the peft package: pip install 'hf_cod[recovery]'"
        ) from error
    content = read_adapter_config(Path(directory) / ADAPTER)
    kind = content.get("peft_type")
    with naming_file(Path(directory) / ADAPTER):
        _check_types(content)
    with _of_peft(directory, "an adapter that PEFT can load"):
        model: nn.Module = PeftModel.from_pretrained(base, str(directory))
    _check_weights(model, Path(directory))
    if getattr(base, "is_quantized", False):
        return model
    if not hasattr(model, "merge_and_unload"):  # prompt tuning and other virtual tokens
        raise ValueError(
            f"model: expected an adapter that can be merged into its base, got {brief(kind)} in {str(directory)!r}; "
            "use the base model"
        )
    with _of_peft(directory, "an adapter that can be merged into its base"):
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True)  # PEFT froze the base, which is now a model as any other


@contextmanager
def _of_peft(directory: str | Path, expected: str) -> Iterator[None]:
    """Names the adapter in errors of PEFT, which does not check what it reads: a damaged adapter leads to any type.

    Raises:
        ValueError: the adapter is not what was expected.
        ImportError: it requires a package that is not installed.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ImportError(f"model: expected the packages of {str(directory)!r}, got: {first_line(error)}") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(error)[:SHOWN_ERROR]}"
        raise ValueError(f"model: expected {expected}, got {cause} in {str(directory)!r}") from error


def _check_types(content: dict[str, Any]) -> None:
    """Checks the types of entries by the annotations of PEFT's configuration, which PEFT itself does not check.

    None, and fractions where PEFT expects whole numbers, are accepted, since its earlier versions wrote both.

    Raises:
        ValueError: an entry has another type.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: dict[Any, Any] = {str(getattr(key, "value", key)): kind for key, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = known.get(str(content.get("peft_type")))
    hints = {} if kind is None else get_type_hints(kind)
    for name, value in content.items():
        if value is None or name not in hints:
            continue
        options = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        allowed = [*options, *(float for option in options if option is int)]
        allowed += [dict for option in options if is_dataclass(option)]
        allowed += [str for option in options if isinstance(option, type) and issubclass(option, str)]  # of an Enum
        if not any(matches(value, option) for option in allowed):
            raise ValueError(f"{name}: expected {described(hints[name])}, got {brief(value)}")


def _check_weights(model: nn.Module, directory: Path) -> None:
    """Checks that the file has all weights of the adapter: PEFT leaves others as they were initialised."""
    from peft import get_peft_model_state_dict

    file = directory / WEIGHTS[0]
    if not file.is_file():
        return
    with open_tensors(file, "model", "weights of an adapter") as tensors:
        found = set(tensors.keys())
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = sorted(own.keys() - found)
    if missing:
        got = brief(sorted(found - own.keys())[0]) if found - own.keys() else "none"
        raise ValueError(f"model: expected the adapter's weight {missing[0]}, got {got} in {str(directory)!r}")
