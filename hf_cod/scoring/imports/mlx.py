"""MLX: sensitivities of `mlx_lm.dynamic_quant`, and the entry `quantization` of config.json."""

from __future__ import annotations

from typing import Any

from hf_cod.io.schema import brief
from hf_cod.scoring.imports.numbers import NamedNumbers, bits_of, number_of

UNQUANTIZED = 16.0


def sensitivities(content: list[Any]) -> NamedNumbers:
    """A list of [path, sensitivity], the higher the more the matrix matters, per weight."""
    values: dict[str, float] = {}
    for place, entry in enumerate(content):
        name = f"sensitivities[{place}]"
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{name}: expected a path and a number, got {brief(entry)}")
        if entry[0] in values:
            raise ValueError(f"{name}: expected each path once, got {entry[0]!r} again")
        values[entry[0]] = number_of(entry[1], f"{name}, {entry[0]}")
    return NamedNumbers("mlx", values, bits=False)


def quantization(content: dict[str, Any]) -> NamedNumbers:
    """Settings of all matrices, and path -> settings of its own, or false for a matrix that is not quantized."""
    values = {
        name: UNQUANTIZED if settings is False else bits_of(settings, name)
        for name, settings in content.items()
        if isinstance(settings, dict) or settings is False
    }
    return NamedNumbers("mlx", values, bits_of(content, "quantization"), bits=True)
