"""Registration with PEFT, whose list of methods is a closed enum; the only file that accesses its internals."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

from hf_cod.models.stored_config import REQUIRES

NAME = "OWLORE"


def peft_type() -> Any:
    """PeftType.OWLORE; the first call adds it to the enum.

    Raises:
        ImportError: PEFT's enum is implemented in an unknown way.
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
    """Registers OwLore for get_peft_model, PeftModel.from_pretrained and AutoPeftModel; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        configs.pop(NAME, None)  # the lazy placeholder
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)
        configs[REQUIRES] = config  # the type that saved files contain


_REFUSAL = (
    "peft: expected a version whose list of methods can be extended, such as 0.21, got another; install it, or train "
    "without adapters by OwLoreAdamW, which does not require peft"
)
