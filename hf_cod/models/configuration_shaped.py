"""Configuration of any model of transformers whose modules have shapes of their own.

One model type, "cod_shaped", serves every family: the file names the family in `base_model_type`, and loading it gives
an instance of a subclass of the family's configuration class with two more fields. These classes are created on demand,
because there are some four hundred families in transformers.
"""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "cod_shaped"
PREFIX = "Shaped"
# transformers' entry for sizes by layer.
PER_LAYER = "per_layer_config"


@dataclass(kw_only=True)
class ShapedFields:
    """Mixin before the configuration class of a family.

    Args:
        module_shapes: Shapes of modules, as `shapes.py` describes them.
        base_model_type: The family's `model_type`.
        layer_overrides: The same sizes in the names of the family's config, index of a layer (a string) -> name ->
            value, if these can say them. In config.json they are `per_layer_config`, by which a stock class of a
            version of transformers that builds layers of their own sizes loads the model; here `module_shapes` builds
            it, and this entry is True.
    """

    module_shapes: Any = None
    base_model_type: Any = None
    layer_overrides: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config with these contents; transformers does not see the overrides, with which it refuses to read sizes
        that differ between layers.
        """
        if config_dict.get("layer_overrides") is True:
            contents = {name: value for name, value in config_dict.items() if name != PER_LAYER}
            config_dict = {**contents, "layer_overrides": config_dict.get(PER_LAYER)}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # the family's class follows in the MRO

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # as above
        overrides = found.pop("layer_overrides", None)
        return found | ({PER_LAYER: overrides, "layer_overrides": True} if overrides else {})

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config.json with an `auto_map` for each head of the family; transformers adds class and code."""
        from .modeling_shaped import heads_of

        self.auto_map = {auto: f"modeling_shaped.{model.__name__}" for auto, model in heads_of(type(self)).items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


class ShapedConfig(PreTrainedConfig):
    """Registered with AutoConfig: loads a file as the configuration of the family that the file names."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config with these contents.

        Raises:
            ValueError: a family that the installed version of transformers does not have.
        """
        family = str(config_dict.get("base_model_type"))
        if family not in CONFIG_MAPPING:
            raise ValueError(
                f"base_model_type: expected a model type of transformers, got {family!r}; upgrade transformers if a "
                "later version has it"
            )
        return shaped_config(CONFIG_MAPPING[family]).from_dict(config_dict, **kwargs)


@cache
def shaped_config(base: Any) -> Any:
    """The configuration class with shapes for a family's configuration class; the first call registers its models."""
    from .modeling_shaped import auto_classes, heads_of

    contents = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with shapes of modules.",
        "model_type": MODEL_TYPE,
        "base_config": base,
        "_auto_class": "AutoConfig",
        # Parallel plans of families split matrices by name; factors have other names.
        "base_model_tp_plan": None,
        "base_model_pp_plan": None,
    }
    made = type(PREFIX + base.__name__, (ShapedFields, base), contents)
    for auto, model in heads_of(made).items():
        auto_classes()[auto].register(made, model, exist_ok=True)
    return made


def __getattr__(name: str) -> Any:
    """The class of that name, for pickle and for imports."""
    base: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shaped_config(base)


ShapedConfig.register_for_auto_class()
