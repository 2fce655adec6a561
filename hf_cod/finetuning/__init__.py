"""Fine-tuning a few sampled layers at a time, their gradients in low rank: OwLore, LISA and GaLore."""

from hf_cod.finetuning.owlore import OwLoreAdamW, OwLoreFactory, owlore
from hf_cod.finetuning.sampling import LayerSampler
from hf_cod.finetuning.settings import OwLoreSettings

__all__ = ["LayerSampler", "OwLoreAdamW", "OwLoreFactory", "OwLoreSettings", "owlore"]
