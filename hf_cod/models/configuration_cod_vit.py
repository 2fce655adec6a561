"""Configuration of the Vision Transformer with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.vit.configuration_vit import ViTConfig

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_vit import CodViTModel  # noqa: F401


@strict
class CodViTConfig(NormPlacementConfig, ViTConfig):
    """ViT with a choice of `norm_placement`."""

    model_type = "cod_vit"

    @classmethod
    def auto_heads(cls) -> dict[str, str]:
        """Auto class -> suffix of the model class's name."""
        return {"AutoModel": "Model", "AutoModelForImageClassification": "ForImageClassification"}


CodViTConfig.register_for_auto_class()
