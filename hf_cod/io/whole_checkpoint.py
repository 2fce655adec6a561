"""Everything that came with a model goes with it when a command writes the changed model.

That is the tokenizer, the configs of processors, chat templates, custom code, the generation config, and weights that
transformers does not load (`unread_weights.py`). It is collected before the work, so that what is missing or invalid is
an error then, and not afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cod.io.adapters import base_of
from hf_cod.io.display import named
from hf_cod.io.generation import mend_generation
from hf_cod.io.loading import weight_files
from hf_cod.io.model_config import CONFIG
from hf_cod.io.models import locate
from hf_cod.io.offloaded import offloaded_weights
from hf_cod.io.offloaded_checkpoint import save_offloaded
from hf_cod.io.reading import parse_json, read_text
from hf_cod.io.settings import ModelSettings
from hf_cod.io.unread_weights import append_weights, promises, unread_weights, withdraw
from hf_cod.models.checkpoint import WITH_CODE, copy_companion, find_companions

# Entries of a config that say nothing about the shapes of weights.
_NOT_SHAPES = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class WholeCheckpoint:
    """What came with a loaded model, for writing it with the changed model.

    Args:
        name: what the model was loaded from: a Hub id, a directory or a GGUF file.
        loading: the settings it was loaded with.
        model: the loaded model, not changed yet; flags of its generation config that have no effect are removed.
        tokenizer: its tokenizer; None if it has none.

    Attributes:
        base: the base of the adapter that the model was loaded from, which is merged; None if it was no adapter.

    Raises:
        ValueError: the generation config cannot be saved, or the Hub did not answer.
    """

    base: str | None = None

    def __init__(self, name: str, loading: ModelSettings, model: Any, tokenizer: Any) -> None:
        self._name, self._tokenizer = name, tokenizer
        self._notes = mend_generation(model, name)
        self._files: dict[str, str] = {}
        self._unread: dict[str, str] = {}
        self._shapes, self._promised = _shapes(model.config), promises(model.config)
        for source, options in _sources(name, loading):
            self._files |= find_companions(source, options["revision"], (*WITH_CODE, CONFIG))
            base = base_of(source)
            self.base = base or self.base
            if base is None:
                self._unread |= unread_weights(model, weight_files(source, options))

    def save(self, model: Any, directory: Path) -> list[str]:
        """Writes the changed model with everything that came with it.

        Args:
            model: the changed model, or an adapter on a quantized model.
            directory: the directory for the results.

        Returns:
            Notes for the report: what was mended, and what could not be kept.
        """
        notes = self.before_saving(model)
        if offloaded_weights(model) is None:
            model.save_pretrained(directory)
        else:
            save_offloaded(model, directory)
        self.after_saving(model, directory)
        return notes

    def before_saving(self, model: Any) -> list[str]:
        """Mends the configs of a changed model that others save; returns notes for the report, as `save` does."""
        return list(dict.fromkeys([*self._notes, *mend_generation(model, self._name), *self._unread_notes(model)]))

    def after_saving(self, model: Any, directory: Path) -> None:
        """Writes everything that came with the model beside a changed model that was saved."""
        self.save_files(directory)
        if self._unread and self._fits(model):
            append_weights(directory, self._unread)

    def save_files(self, directory: Path) -> None:
        """Writes tokenizer, processors, chat templates and custom code into a directory with a model or an adapter."""
        # Before chat_template.jinja, processors had a template of their own in chat_template.json, which a processor
        # ignores beside the newer file.
        own = "chat_template.json" in self._files and "chat_template.jinja" not in self._files
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory, save_jinja_files=not own)
        needed = {f"{module}.py" for module in _modules(directory)} & self._files.keys()
        for name, path in self._files.items():
            if not (directory / name).exists() and (needed or not name.endswith(".py")):
                copy_companion(path, directory / name)

    def _fits(self, model: Any) -> bool:
        """Whether the weights that transformers does not load fit the changed model as they fit the original one."""
        return not hasattr(model, "peft_config") and _shapes(model.config) == self._shapes

    def _unread_notes(self, model: Any) -> list[str]:
        """Notes on weights that transformers does not load; fields that would promise missing ones are set to 0."""
        names, count = sorted(self._unread), len(self._unread)
        told = named(names)
        if hasattr(model, "peft_config"):
            return []
        if names and self._fits(model):
            return [f"{count} weights that transformers does not load were copied unchanged: {told}"]
        notes = []
        if names:
            notes.append(
                f"{count} weights that transformers does not load do not fit the model and were left out: {told}"
            )
        withdraw(model.config)
        left = promises(model.config)
        for field, value in self._promised.items():
            done = f"is {value} and cannot be 0" if field in left else f"was {value} and is now 0"
            missing = "left out" if names else "not in the files of the model"
            notes.append(f"{field} {done}: the weights for multi-token prediction are {missing}")
        return notes


def _sources(name: str, loading: ModelSettings) -> list[tuple[str, dict[str, Any]]]:
    """The model's source and options; for an adapter first those of its base."""
    source, options = locate(name, loading)
    if "gguf_file" in options:  # everything is in the one file
        return []
    base = base_of(source)
    return [*([] if base is None else _sources(base, loading)), (source, options)]


def _shapes(config: Any) -> dict[str, Any]:
    """The entries of a config on which shapes of weights may depend."""
    left_out = {*_NOT_SHAPES, *promises(config)}

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: kept(inner) for name, inner in value.items() if name not in left_out}

    found: dict[str, Any] = kept(parse_json(config.to_json_string(use_diff=False), "model", nan=True))
    return found


def _modules(directory: Path) -> set[str]:
    """Modules of custom code that the configs in a directory name."""
    found = set()
    for name in (*WITH_CODE, CONFIG):
        if (directory / name).is_file():
            content = parse_json(read_text(directory / name, "model"), "model", nan=True)
            auto_map = content.get("auto_map") or {}
            values = [each for value in auto_map.values() for each in (value if isinstance(value, list) else [value])]
            found |= {str(value).split(".")[0] for value in values if value is not None and "--" not in str(value)}
    return found
