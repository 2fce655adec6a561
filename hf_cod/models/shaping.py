"""Records the shapes of replaced modules in a model's config and class, so that it can be saved and loaded."""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from .configuration_shaped import MODEL_TYPE, shaped_config
from .modeling_shaped import name_apart, shaped_model, stock_heads
from .own_config import own_config
from .shapes import ShapedModel, build_shapes, number_of, recorded_sizes


def check_shapeable(model: Any) -> None:
    """Checks that `record_shapes` supports a model's class.

    Raises:
        ValueError: a class that is not of transformers or of this package, or one that no Auto class loads.
    """
    name = type(model).__name__
    family = getattr(getattr(model, "config", None), "model_type", None)
    stock = getattr(transformers, name, None) is type(model) and family in CONFIG_MAPPING
    if not (stock or isinstance(model, ShapedModel)):
        raise ValueError(
            f"model: expected a class of transformers or hf_cod, which matrices of other shapes require, got {name} "
            "with code of its own; prune, drop-layers and finetune accept it"
        )
    if stock:
        known = {head.__name__ for _, head in stock_heads(type(model.config))}
        if not known:
            raise ValueError(
                "model: expected a class that an Auto class loads, which matrices of other shapes require, got "
                f"{name}; prune accepts it"
            )
        if name not in known:
            wanted = f"one of {', '.join(sorted(known))}" if known else f"a class of {family}"
            raise ValueError(f"model: expected {wanted}, which Auto classes load, got {name}")


def record_shapes(model: Any, changes: dict[str, dict[str, int]], overrides: Any = None) -> None:
    """Builds new shapes in a model, unless it has them already, and gives it a class that builds them from its config.

    `isinstance(model, LlamaForCausalLM)` stays true. Existing weights are kept; the weights of modules that are built
    here are not initialised.

    Args:
        model: see `check_shapeable`.
        changes: name of a module in the model -> its changes, as in `shapes.py`.
        overrides: the same as `layer_overrides` of the config, if these can say it.

    Raises:
        ValueError: a module outside the base model (a head), or a shape that the module cannot have.
    """
    check_shapeable(model)
    shapes = _inside_base(model, changes)
    build_shapes(model.base_model, shapes)
    own_config(model)
    base, was_shaped = type(model), isinstance(model, ShapedModel)
    _shape_config(model.config, shapes, was_shaped)
    if hasattr(model.config, "layer_overrides"):  # not of models with placements of norms, which no stock class builds
        model.config.layer_overrides = overrides
    if not was_shaped:
        model.__class__ = shaped_model(base, type(model.config))
        model._weight_conversions = None  # files then use the model's names of weights
        name_apart(model)


def lost_in_reload(model: Any, changes: dict[str, dict[str, int]]) -> dict[str, str]:
    """Modules that would not have these sizes if the model was loaded again, because the model replaces them.

    A model is built without memory for weights; nothing is changed.

    Args:
        model: see `check_shapeable`.
        changes: see `record_shapes`.

    Returns:
        Name of a module -> a sentence that says which of its sizes would be lost.
    """
    shapes = _inside_base(model, changes)
    config = copy.deepcopy(model.config)
    was_shaped = isinstance(model, ShapedModel)
    _shape_config(config, shapes, was_shaped)
    with torch.device("meta"):
        built: Any = (type(model) if was_shaped else shaped_model(type(model), type(config)))(config)
    lost: dict[str, str] = {}
    for name, short, sizes in zip(changes, shapes, changes.values(), strict=True):
        module = built.base_model.get_submodule(short)
        if isinstance(module, nn.Linear | Conv1D):
            has: dict[str, Any] = recorded_sizes(module)
        else:
            values = {key: number_of(module, key) for key in sizes}
            has = {key: len(value) if isinstance(value, Tensor) else value for key, value in values.items()}
            if type(module) is not type(model.base_model.get_submodule(short)):
                has = {}  # the forward has replaced this module, and would do so again
        wrong = [key for key, value in sizes.items() if has.get(key) != value]
        if wrong:
            lost[name] = f"a reloaded model would lose {wrong[0]} of its {short}, because it replaces the module"
    return lost


def _inside_base(model: Any, changes: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    outside = [name for name in changes if not name.startswith(prefix)]
    if outside:
        raise ValueError(f"module_shapes: expected modules inside {prefix.rstrip('.')}, got {outside[0]!r}")
    return {name.removeprefix(prefix): sizes for name, sizes in changes.items()}


def _shape_config(config: Any, shapes: dict[str, dict[str, int]], is_shaped: bool) -> None:
    if not is_shaped:
        config.base_model_type = config.model_type
        config.__class__ = shaped_config(type(config))
        config.model_type = MODEL_TYPE  # on the instance, because a config from a file has the attribute, too
    known = getattr(config, "module_shapes", None) or {}
    config.module_shapes = {**known, **{name: {**known.get(name, {}), **sizes} for name, sizes in shapes.items()}}
