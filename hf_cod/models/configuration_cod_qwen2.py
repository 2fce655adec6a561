"""Configuration of Qwen2 and Qwen2.5 with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_qwen2 import CodQwen2Model  # noqa: F401


@strict
class CodQwen2Config(NormPlacementConfig, Qwen2Config):
    """Qwen2 or Qwen2.5 with a choice of `norm_placement`."""

    model_type = "cod_qwen2"


CodQwen2Config.register_for_auto_class()
