"""Models of any family of transformers whose modules have shapes of their own; `shapes.py` builds them.

The classes are created on demand; `configuration_shaped.py` gives the reason.
"""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_shaped import PREFIX, shaped_config
from .shapes import FamilyCode, ShapedModel

# Before the name of a class of transformers, of a model inside of a shaped one.
INNER = "Inner"


class FamilyModel(ShapedModel):
    """Mixin for a class of transformers: models inside of it, such as the one below a head, get names of their own."""

    def post_init(self) -> None:
        """Builds the modules, see `ShapedModel`, and renames the classes of the models inside."""
        super().post_init()
        name_apart(self)


class InnerModel(FamilyCode):
    """Mixin for a model inside of a shaped one, with a config of its own: its class has another name, and no more."""


def name_apart(model: Any) -> None:
    """Renames the classes of some models inside of a shaped one.

    By their names (Dinov2Model) transformers renames, cuts and joins weights while it saves and loads them, which is
    right for modules with the shapes of the family alone.
    """
    for module in model.modules():
        own: Any = type(module)
        if issubclass(own, PreTrainedModel) and get_checkpoint_conversion_mapping(own.__name__) is not None:
            same = type(module.config) is type(model.config)
            module.__class__ = shaped_model(own, type(model.config)) if same else inner_model(own)
            # What the model records (hidden states) is noted by class, in its constructor, which has run before.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), own._can_record_outputs)


@cache
def inner_model(base: Any) -> Any:
    """The class with another name for a class of transformers."""
    return type(INNER + base.__name__, (InnerModel, base), {"__module__": __name__, "__doc__": base.__doc__})


@cache
def shaped_model(base: Any, config_class: Any) -> Any:
    """The model class with shapes for a class of transformers.

    Args:
        base: the class of transformers.
        config_class: result of `shaped_config` for its configuration class.
    """
    contents = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with shapes of modules.",
        "config_class": config_class,
        "_auto_class": "AutoModel",
    }
    return type(PREFIX + base.__name__, (FamilyModel, base), contents)


@cache
def auto_classes() -> dict[str, Any]:
    """Name -> Auto class, of all that transformers has for models; `AutoModel` is the first."""
    found = {name: getattr(modeling_auto, name) for name in ("AutoModel", *modeling_auto.__all__)}
    return {name: auto for name, auto in found.items() if isinstance(auto, type) and hasattr(auto, "_model_mapping")}


def heads_of(config_class: Any) -> dict[str, Any]:
    """Auto class -> the model class that it loads for a configuration class of `shaped_config`."""
    heads: dict[str, Any] = {}
    for name, base in stock_heads(config_class.base_config):
        heads.setdefault(name, shaped_model(base, config_class))
    return heads


def stock_heads(config_class: Any) -> list[tuple[str, Any]]:
    """(Auto class, model class) of each head of a configuration class of transformers."""
    heads = []
    for name, auto in auto_classes().items():
        try:
            found = auto._model_mapping.get(config_class, None)
        except ValueError:  # a mapping may name a class that its version of transformers does not have
            found = None
        heads += [(name, base) for base in (found if isinstance(found, tuple) else (found,)) if base is not None]
    return heads


def __getattr__(name: str) -> Any:
    """The class of that name, for `auto_map` and pickle."""
    prefix = INNER if name.startswith(INNER) else PREFIX
    base: Any = getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return inner_model(base) if prefix == INNER else shaped_model(base, shaped_config(base.config_class))
