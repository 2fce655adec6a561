"""OwLore as a PEFT method; importing this package registers it with PEFT."""

from hf_cod.io.bitsandbytes_advice import advice_silenced

try:
    with advice_silenced():  # of bitsandbytes, which is imported with PEFT
        from hf_cod.training.adapters.config import OwLoreConfig
        from hf_cod.training.adapters.model import OwLoreModel
        from hf_cod.training.adapters.registry import register
except ImportError as error:
    raise ImportError(f"OwLoreConfig requires peft 0.21 or later: pip install -U peft ({error})") from error

register(OwLoreConfig, OwLoreModel)

__all__ = ["OwLoreConfig", "OwLoreModel"]
