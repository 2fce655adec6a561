"""The entry `quantization_config` of config.json, as all formats of this package read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_cod.io.schema import check_known


class StoredQuantization(QuantizationConfigMixin):
    """Base of the configurations that transformers reads for a format; its subclasses are dataclasses.

    Attributes:
        EARLIER: name of an entry in earlier files -> its current name.
    """

    EARLIER: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the output of `to_dict`.

        Raises:
            ValueError: an entry that is unknown to this version.
        """
        earlier = {name: new for name, new in cls.EARLIER.items() if new not in config_dict}
        config_dict = {earlier.get(name, name): value for name, value in config_dict.items()}
        check_known(cls, config_dict, "quantization_config", "pip install -U hf_cod")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
