"""A model in memory whose modules were exchanged becomes one that is saved and loaded as it is."""

# Classes are hashable, whatever mypy makes of their instances' __hash__.
# mypy: disable-error-code="arg-type"
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_shaped import MODEL_TYPE, shaped_config
from .modeling_shaped import shaped_model, stock_heads
from .own_config import own_config
from .shapes import ShapedModel, build_shapes


def check_shapeable(model: Any) -> None:
    """Makes sure that `record_shapes` will find the classes that it needs.

    Raises:
        ValueError: no model of transformers itself or of this package, or one that no Auto class would load.
    """
    name = type(model).__name__
    family = getattr(getattr(model, "config", None), "model_type", None)
    stock = getattr(transformers, name, None) is type(model) and family in CONFIG_MAPPING
    if not (stock or isinstance(model, ShapedModel)):
        raise ValueError(f"model: expected a class of transformers or hf_cod, got {name}, which could not be saved")
    if stock:
        known = {head.__name__ for _, head in stock_heads(type(model.config))}
        if name not in known:
            raise ValueError(f"model: expected one of {', '.join(sorted(known))}, which Auto classes load, got {name}")


def record_shapes(model: Any, changes: dict[str, dict[str, int]]) -> None:
    """Gives a model its new shapes, where it has not got them yet, and a class that builds them again from its config.

    `isinstance(model, LlamaForCausalLM)` stays true. Weights that exist are kept; those of modules that are built here
    are not initialised.

    Args:
        model: see `check_shapeable`.
        changes: module's name in the model -> what changes, as in `shapes.py`.

    Raises:
        ValueError: a module outside the base model (a head), or a shape that it cannot have.
    """
    check_shapeable(model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    outside = [name for name in changes if not name.startswith(prefix)]
    if outside:
        raise ValueError(f"module_shapes: expected modules inside {prefix.rstrip('.')}, got {outside[0]!r}")
    shapes = {name.removeprefix(prefix): sizes for name, sizes in changes.items()}
    build_shapes(model.base_model, shapes)
    own_config(model)
    config, base, family = model.config, type(model), type(model.config)
    if not isinstance(model, ShapedModel):
        config.base_model_type = config.model_type
        config.__class__ = shaped_config(family)
        config.model_type = MODEL_TYPE  # a config that was read from a file has one of its own
        model.__class__ = shaped_model(base, type(config))
        model._weight_conversions = None  # files then name weights as the model does
    known = getattr(config, "module_shapes", None) or {}
    config.module_shapes = {**known, **{name: {**known.get(name, {}), **sizes} for name, sizes in shapes.items()}}
