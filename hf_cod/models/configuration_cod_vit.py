"""Configuration of the Vision Transformer with a choice of norm placement."""

from huggingface_hub.dataclasses import strict
from transformers.models.vit.configuration_vit import ViTConfig

from .configuration_cod import NormPlacementConfig


@strict
class CodViTConfig(NormPlacementConfig, ViTConfig):
    """ViT, with its norms where `norm_placement` puts them."""

    model_type = "cod_vit"

    @classmethod
    def auto_heads(cls) -> dict[str, str]:
        """Auto class -> ending of the model class's name."""
        return {"AutoModel": "Model", "AutoModelForImageClassification": "ForImageClassification"}


CodViTConfig.register_for_auto_class()
