"""OwLoreConfig: what PEFT's get_peft_model makes OwLore adapters from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from hf_cod.io.arguments import checked
from hf_cod.io.files import write_text
from hf_cod.io.settings import Default
from hf_cod.models.stored_config import REQUIRES
from hf_cod.training.adapters.registry import peft_type


@checked
@dataclass
class OwLoreConfig(PeftConfig):
    """An adapter that `OwLoreAdamW` trains, a few layers at a time (Li et al. 2024, arXiv 2405.18380).

        model = get_peft_model(model, OwLoreConfig(r=128))
        Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=owlore(scores, n_active=5, lr=1e-3))

    Each matrix W gets D = B A + lift(N, P) (`Increment`): while a layer trains, N learns in the fixed basis P of its
    gradient; at the next draw that joins B A, a product of rank `max_rank` at most. What does not fit is cut off at the
    smallest singular values and told by `model.lost_energy()`. W itself is not written, so it may be quantized; weight
    decay acts on N alone.

    `import hf_cod` lets PEFT load such an adapter in a process that has not made one.

    Raises:
        ValueError: a rank below 1.
    """

    r: int = field(
        default=Default(128),
        metadata={"help": "rank of what trains now; the default at most the width of the layers' matrices"},
    )
    max_rank: int | None = field(
        default=None, metadata={"help": "bound of the rank of what was learnt before; None: twice r"}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "names of matrices, as in LoRA; None: all of the layers, but for banks of experts"},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names of matrices to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layers; None: all"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules beside the layers that train and are saved whole, such as a head"}
    )
    held: dict[str, tuple[int, int]] = field(
        default_factory=dict,
        metadata={"help": "of a saved adapter the columns of P and B of each matrix; stands in its file alone"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("r", "max_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("target_modules", "exclude_modules"):
            names: Any = getattr(self, name)
            setattr(self, name, set(names) if isinstance(names, list) else names)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, whose type is in the file what a reader without this package has to do.

        `held` is in the file alone: the config may make a new adapter, which holds nothing.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.held = {}
        path = Path(save_directory) / CONFIG_NAME
        written = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps({**written, "peft_type": REQUIRES}, indent=2, sort_keys=True))
