"""Mends a generation config that transformers would refuse to save, before a long run instead of after it."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig

from hf_cod.io.display import one_line

# Flags that choose how to generate; what contradicts them has no effect, and is removed instead of them.
_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def mend_generation(model: Any, source: str) -> list[str]:
    """Removes invalid flags from the model's generation config, such as a temperature without sampling.

    Transformers refuses to save a changed generation config with such flags, and Trainer changes it. They have no
    effect on generation, or stop it with an error.

    Args:
        model: the model; its generation config is changed.
        source: where it was loaded from, for errors.

    Returns:
        A sentence that lists the removed flags, if there are any.

    Raises:
        ValueError: the generation config is invalid for another reason.
    """
    config = getattr(model, "generation_config", None)
    refused = None if config is None else _refused(config)
    if refused is None:
        return []
    removed = {}
    default = GenerationConfig()
    for name, value in vars(config).copy().items():
        if name not in _MODES and value != getattr(default, name, None) and re.search(rf"\b{name}\b", refused):
            removed[name] = value
            setattr(config, name, getattr(default, name, None))
    again = _refused(config)
    if again is not None:
        raise ValueError(
            f"model: expected a generation_config.json that transformers can save, got {one_line(again)} in "
            f"{source!r}; correct or delete the file"
        )
    told = ", ".join(f"{name}={value!r}" for name, value in removed.items())
    return [f"invalid flags were removed from generation_config.json: {told}"]


def _refused(config: Any) -> str | None:
    """Why transformers refuses to save a generation config; None if it does not."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None
