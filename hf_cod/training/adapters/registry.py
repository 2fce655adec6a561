"""The hook into PEFT's registry, whose list of methods is an enum and closed: the one place that reaches into it."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

from hf_cod.models.stored_config import REQUIRES

NAME = "OWLORE"


def peft_type() -> Any:
    """PeftType.OWLORE, which is added to the enum on the first call.

    Raises:
        ImportError: PEFT's enum is made in another way than this knows.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    try:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        setattr(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
    except (AttributeError, TypeError) as error:
        raise ImportError(_REFUSAL) from error
    if PeftType(NAME) is not member or PeftType[NAME] is not member or NAME not in list(PeftType):
        raise ImportError(_REFUSAL)
    return member


def register(config: type, model: type) -> None:
    """Makes get_peft_model, PeftModel.from_pretrained and AutoPeftModel know OwLore; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        configs.pop(NAME, None)  # what stood for it until it was needed
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)
        configs[REQUIRES] = config  # as files name it


_REFUSAL = (
    "peft: expected a version that a method can be added to, such as 0.21, got another; OwLoreAdamW trains models "
    "without it"
)
