"""OwLoreConfig: the PEFT configuration of OwLore adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from hf_cod.io.arguments import checked
from hf_cod.io.files import write_text
from hf_cod.io.reading import read_json
from hf_cod.io.schema import check_value, limits
from hf_cod.io.settings import Default, check_least
from hf_cod.models.stored_config import REQUIRES
from hf_cod.training.adapters.registry import peft_type


@checked
@dataclass
class OwLoreConfig(PeftConfig):
    """Configuration of an adapter that `OwLoreAdamW` trains, a few layers at a time (Li et al. 2024, arXiv 2405.18380).

        model = get_peft_model(model, OwLoreConfig(r=128))
        Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=owlore(scores, n_active=5, lr=1e-3))

    Each matrix W gets the increment D = B A + lift(N, P) (`Increment`). While a layer trains, N is trained in the fixed
    basis P of its gradient. When layers are sampled again, lift(N, P) is folded into B A, whose rank is at most
    `max_rank`: the smallest singular values beyond it are cut off, and `model.lost_energy()` reports their share. W is
    not written, so it may be quantized. In a bank of experts each expert has an increment of its own. Weight decay
    applies to N only.

    PEFT can load such an adapter in any process after `import hf_cod`.

    Raises:
        ValueError: a rank below 1, or `held` of another type.
    """

    r: int = field(
        default=Default(128),
        metadata={
            "help": "rank of the update that currently trains; the default is lowered to the width of the matrices"
        },
    )
    max_rank: int | None = field(
        default=None, metadata={"help": "maximum rank of the folded earlier updates; None: twice r"}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "names of matrices, as in LoRA; None: all matrices of the layers; none with target_parameters"
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "names of banks of experts, as in LoRA; None: all if target_modules is None, else none"},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names of matrices to exclude"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layers; None: all"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "modules outside the layers that train in full and are saved with the adapter, such as a head"
        },
    )
    held: dict[str, tuple[int, int]] = field(
        default_factory=dict,
        metadata={"help": "for each matrix of a saved adapter, the columns of P and B; set in saved files only"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        check_least(self, r=1, max_rank=1)
        check_value(self.held, dict[str, tuple[int, int]], "held", limits(least=0))
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            names: Any = getattr(self, name)
            setattr(self, name, set(names) if isinstance(names, list) else names)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's method; the file's `peft_type` names the import that loading requires, for users who lack it.

        `held` is written to the file only and then cleared, because the config may also create a new, empty adapter.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.held = {}
        path = Path(save_directory) / CONFIG_NAME
        written = read_json(path, "adapter")
        write_text(path, json.dumps({**written, "peft_type": REQUIRES}, indent=2, sort_keys=True))
