"""SparseConfig: the entry of a packed model in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_cod.compression.sparse.settings import PackSettings
from hf_cod.compression.stored_quantization import StoredQuantization
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.schema import check_fields, limits
from hf_cod.layers.replacement_modules import INSTALL

METHOD = "hf_cod_sparse"


@renamed(minimum="min_sparsity")
@checked
@dataclass(kw_only=True)
class SparseConfig(PackSettings, StoredQuantization):
    """Sparse storage of a model's matrices, as a `quantization_config` of transformers.

    Passed to `from_pretrained` with a dense checkpoint of a pruned model, it packs the model while loading. A packed
    checkpoint contains its own config.

    Attributes:
        min_sparsity: matrices in which at least this share of the weights is zero are packed.
        modules: name -> number of stored weights of each packed matrix; filled in by packing.
        quant_method: the name under which this package is registered in transformers.
        install: an instruction for loading without this package installed; saved in config.json.
    """

    EARLIER: ClassVar[dict[str, str]] = {"minimum": "min_sparsity"}

    modules: dict[str, int] = field(default_factory=dict, metadata=limits(least=0))
    quant_method: Any = METHOD
    install: str = INSTALL

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()
