"""The entry `quantization_config` of config.json, as all formats of this package read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_cod.io.schema import brief, check_known


class StoredQuantization(QuantizationConfigMixin):
    """Base of the configurations that transformers reads for a format; its subclasses are dataclasses.

    Attributes:
        EARLIER: name of an entry in earlier files -> its current name.
        NOT_STORED: names of settings that are used for quantizing; in a file they would name other files.
    """

    EARLIER: ClassVar[Mapping[str, str]] = {}
    NOT_STORED: ClassVar[Collection[str]] = ()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the output of `to_dict`.

        Raises:
            ValueError: an entry that is unknown to this version, or one that is not stored, of a stored model.
        """
        earlier = {name: new for name, new in cls.EARLIER.items() if new not in config_dict}
        config_dict = {earlier.get(name, name): value for name, value in config_dict.items()}
        check_known(cls, config_dict, "quantization_config", "pip install -U hf_cod")
        for name in cls.NOT_STORED if config_dict.get("modules") else ():
            if config_dict.get(name) is not None:
                raise ValueError(f"{name}: expected none with modules, got {brief(config_dict[name])}")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
