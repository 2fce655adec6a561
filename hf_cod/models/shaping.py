"""Records the shapes of replaced modules in a model's config and class, so that it can be saved and loaded."""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_shaped import MODEL_TYPE, shaped_config
from .modeling_shaped import shaped_model, stock_heads
from .own_config import own_config
from .shapes import ShapedModel, build_shapes


def check_shapeable(model: Any) -> None:
    """Checks that `record_shapes` supports a model's class.

    Raises:
        ValueError: a class that is not of transformers or of this package, or one that no Auto class loads.
    """
    name = type(model).__name__
    family = getattr(getattr(model, "config", None), "model_type", None)
    stock = getattr(transformers, name, None) is type(model) and family in CONFIG_MAPPING
    if not (stock or isinstance(model, ShapedModel)):
        raise ValueError(f"model: expected a class of transformers or hf_cod, got {name}, which cannot be saved")
    if stock:
        known = {head.__name__ for _, head in stock_heads(type(model.config))}
        if name not in known:
            raise ValueError(f"model: expected one of {', '.join(sorted(known))}, which Auto classes load, got {name}")


def record_shapes(model: Any, changes: dict[str, dict[str, int]]) -> None:
    """Builds new shapes in a model, unless it has them already, and gives it a class that builds them from its config.

    `isinstance(model, LlamaForCausalLM)` stays true. Existing weights are kept; the weights of modules that are built
    here are not initialised.

    Args:
        model: see `check_shapeable`.
        changes: name of a module in the model -> its changes, as in `shapes.py`.

    Raises:
        ValueError: a module outside the base model (a head), or a shape that the module cannot have.
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
        config.model_type = MODEL_TYPE  # on the instance, because a config from a file has the attribute, too
        model.__class__ = shaped_model(base, type(config))
        model._weight_conversions = None  # files then use the model's names of weights
    known = getattr(config, "module_shapes", None) or {}
    config.module_shapes = {**known, **{name: {**known.get(name, {}), **sizes} for name, sizes in shapes.items()}}
