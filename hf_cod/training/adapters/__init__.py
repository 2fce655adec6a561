"""OwLore as a method of PEFT; importing this makes PEFT know it."""

try:
    from hf_cod.training.adapters.config import OwLoreConfig
    from hf_cod.training.adapters.model import OwLoreModel
    from hf_cod.training.adapters.registry import register
except ImportError as error:
    raise ImportError(f"OwLoreConfig needs peft 0.21 or later: pip install -U peft ({error})") from error

register(OwLoreConfig, OwLoreModel)

__all__ = ["OwLoreConfig", "OwLoreModel"]
