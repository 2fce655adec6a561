"""Models of any family of transformers whose modules have shapes of their own; `shapes.py` builds them.

The classes are created on demand; `configuration_shaped.py` gives the reason.
"""

# Classes are hashable, although mypy infers otherwise from their instances' __hash__.
# mypy: disable-error-code="arg-type"
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedModel

from .configuration_shaped import PREFIX, shaped_config
from .shapes import ShapedModel

# The Auto classes that can load such a model, as far as its family has the head.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
)


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
    return type(PREFIX + base.__name__, (ShapedModel, base), contents)


def heads_of(config_class: Any) -> dict[str, Any]:
    """Auto class -> the model class that it loads for a configuration class of `shaped_config`."""
    heads: dict[str, Any] = {}
    for name, base in stock_heads(config_class.base_config):
        heads.setdefault(name, shaped_model(base, config_class))
    return heads


def stock_heads(config_class: Any) -> list[tuple[str, Any]]:
    """(Auto class, model class) of each head of a configuration class of transformers."""
    heads = []
    for name in AUTO_CLASSES:
        found = getattr(transformers, name)._model_mapping.get(config_class, None)
        heads += [(name, base) for base in (found if isinstance(found, tuple) else (found,)) if base is not None]
    return heads


def __getattr__(name: str) -> Any:
    """The class of that name, for `auto_map` and pickle."""
    base: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shaped_model(base, shaped_config(base.config_class))
