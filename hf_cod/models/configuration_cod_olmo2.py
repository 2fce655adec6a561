"""Configuration of OLMo 2 with a choice of norm placement."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_olmo2 import CodOlmo2Model  # noqa: F401


@strict
class CodOlmo2Config(NormPlacementConfig, Olmo2Config):
    """OLMo 2, with norms on the outputs of the sublayers (`reordered`) or on inputs and outputs (`sandwich`).

    The other placements are not supported: the norms of a stock OLMo 2 checkpoint have the same names as those of
    Llama, so it would silently load into another placement and compute another function."""

    model_type = "cod_olmo2"

    stock_placement: ClassVar[str] = "reordered"

    norm_placement: Any = "reordered"

    @classmethod
    def valid_placements(cls) -> tuple[str, ...]:
        """The placements that the family supports."""
        return ("reordered", "sandwich")


CodOlmo2Config.register_for_auto_class()
