"""OwLore as a method of PEFT; importing this makes PEFT know it. Needs the peft package."""

from hf_cod.finetuning.adapters.config import OwLoreConfig
from hf_cod.finetuning.adapters.model import OwLoreModel
from hf_cod.finetuning.adapters.registry import register

register(OwLoreConfig, OwLoreModel)

__all__ = ["OwLoreConfig", "OwLoreModel"]
