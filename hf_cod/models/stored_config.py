"""The configuration of a model whose weights are stored in a format of this package.

Transformers ignores an unknown `quant_method`, and fails later with tensors of wrong shapes. It rejects an unknown
`model_type` at once, and quotes it. Therefore config.json of such a model has `REQUIRES` as its model type, and the
family's own model type in another field; a model in memory has the family's own.
"""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

REQUIRES = "requires hf_cod: pip install hf_cod, then import hf_cod"
FAMILY_TYPE = "hf_cod_model_type"


class StoredConfig(PreTrainedConfig):
    """Registered with AutoConfig: loads a file as the configuration of the family that the file names."""

    model_type = REQUIRES

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config with these contents.

        Raises:
            ValueError: a family that the installed version of transformers does not have.
        """
        contents = {name: value for name, value in config_dict.items() if name != FAMILY_TYPE}
        family = str(config_dict.get(FAMILY_TYPE))
        if family not in CONFIG_MAPPING or family == REQUIRES:
            raise ValueError(
                f"{FAMILY_TYPE}: expected a model type of transformers, got {family!r}; upgrade transformers if a "
                "later version has it"
            )
        return CONFIG_MAPPING[family].from_dict({**contents, "model_type": family}, **kwargs)


class _Stored:
    """Mixin before the configuration class of a family."""

    family: Any
    # No remote code: it would run without this package, which is required to read the weights.
    _auto_class = None

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Writes config.json."""
        written = json.loads(self.to_json_string(use_diff))  # type: ignore[attr-defined]
        written.pop("auto_map", None)
        written |= {FAMILY_TYPE: written["model_type"], "model_type": REQUIRES}
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.family,), self.__dict__


def check_storable(model: Any) -> None:
    """Checks, before any work, that a model can be saved and loaded with weights in a format of this package.

    Raises:
        ValueError: a model with code of its own, which transformers would run without this package.
    """
    config = model.config
    if isinstance(config, _Stored) or type(config) is StoredConfig:
        return
    if config.model_type not in CONFIG_MAPPING:
        raise ValueError(
            "model: expected a model type of transformers, which packed and quantized weights require, got "
            f"{config.model_type!r} with code of its own; prune, drop-layers and finetune accept it"
        )


def mark_stored(model: Any) -> None:
    """Makes the model's config.json state that loading requires this package. A second call does nothing."""
    config = model.config
    if isinstance(config, _Stored):
        return
    family = type(config)
    for name in ("model_type", FAMILY_TYPE):  # entries of the file, if the config was not loaded by an Auto class
        config.__dict__.pop(name, None)
    config.__class__ = _stored_class(family)


def unmark_stored(model: Any) -> bool:
    """Undoes `mark_stored`; returns whether the model was marked."""
    config = model.config
    if not isinstance(config, _Stored):
        return False
    config.__class__ = config.family
    return True


def clear_quantized(model: Any) -> None:
    """Removes transformers' mark of quantized weights from the configs of a model and of the models inside of it.

    Some models (Falcon Mamba) only ask whether their config has the mark.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            vars(config).pop("_is_quantized", None)


@cache
def _stored_class(family: Any) -> Any:
    """The stored variant of a family's class; it has the same name, by which Auto classes find stock models."""
    contents = {
        "__module__": family.__module__,
        "__qualname__": family.__qualname__,
        "__doc__": family.__doc__,
        "__init__": family.__init__,
        "family": family,
        "model_type": family.model_type,
    }
    return type(family.__name__, (_Stored, family), contents)


def _empty(family: Any) -> Any:
    """An empty instance, for copy and pickle."""
    made = _stored_class(family)
    return made.__new__(made)
