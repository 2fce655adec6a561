"""OwlBnbConfig: which matrices get four bits and which three, as a `quantization_config` of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.quantization.settings import QuantizeSettings, StorageFields
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked
from hf_cod.io.schema import brief, check_fields, check_known
from hf_cod.layers.replacement_modules import INSTALL
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores

METHOD = "owl_bnb"
# What is read while quantizing, and does not belong into config.json.
_NOT_SAVED = ("scores", "allocation", "statistics")


@checked
@dataclass(kw_only=True)
class OwlBnbConfig(QuantizeSettings, QuantizationConfigMixin):
    """Three bits for the matrices of layers that matter less, bitsandbytes' NF4 for the others.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=OwlBnbConfig(bits=3.5, scores=scores))

    Given to `from_pretrained` of a stock checkpoint, it quantizes while loading; a quantized checkpoint brings its own.
    `hf_cod.quantize` does more for a loaded model and a text: it makes up for rounding errors.

    Attributes:
        bits: stored bits a weight, scales included, over all quantized matrices; 3 or 4 gives all the same width.
        scores: LayerScores or their file, which decide who gets four bits; None: earlier layers before later ones,
            which is what the Curse of Depth says of models that nobody measured, and worse than a measured score.
        allocation: LayerAllocation of bits or its file: 3 or 4 for each layer, or between them for one of both widths,
            instead of bits and scores.
        statistics: LayerStatistics or their file; with them scales are searched by what errors do to the outputs.
        skip: parts of module names that are left as they are.
        compute_dtype: torch.dtype or its name that inputs and decoded weights are multiplied in; None: the input's.
        score: which score decided; filled in.
        modules: name -> bits of each quantized matrix; filled in.
        quant_method: what transformers finds this package by.
        install: what a reader of config.json without this package should do.
    """

    scores: Any = None
    allocation: Any = None
    statistics: Any = None
    compute_dtype: Any = None
    score: str | None = None
    modules: dict[str, int] = field(default_factory=dict)
    quant_method: Any = METHOD
    install: str = INSTALL

    def __post_init__(self) -> None:
        self.compute_dtype = _compute_dtype(self.compute_dtype)
        check_fields(self)
        super().__post_init__()
        if isinstance(self.scores, (str, Path)):
            self.scores = LayerScores.load(self.scores)
        if isinstance(self.allocation, (str, Path)):
            self.allocation = LayerAllocation.load(self.allocation)
        if isinstance(self.statistics, (str, Path)):
            self.statistics = LayerStatistics.load(self.statistics)
        wrong = {name: bits for name, bits in self.modules.items() if bits not in BITS}
        if wrong:
            raise ValueError(f"modules: expected {' or '.join(map(str, BITS))} bits each, got {wrong}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads what `to_dict` made.

        Raises:
            ValueError: an entry that this version does not know.
        """
        check_known(cls, config_dict, "quantization_config", "pip install -U hf_cod")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _NOT_SAVED}
        if self.compute_dtype is not None:
            kept["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return copy.deepcopy(kept)


class QuantizeFields(StorageFields, total=False):
    """Fields of `OwlBnbConfig` that `quantize` takes by name."""

    quant_method: Any
    bits: float
    skip: list[str]
    scores: Any
    allocation: Any
    statistics: Any
    compute_dtype: Any
    score: str | None
    modules: dict[str, int]
    install: str


def _compute_dtype(given: Any) -> torch.dtype | None:
    """The dtype that a name means.

    Raises:
        ValueError: no such dtype, or one without fractions.
    """
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is None and given is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"compute_dtype: expected the name of a dtype such as bfloat16 or float32, got {brief(given)}")
    return found


def score_of(config: OwlBnbConfig) -> str | None:
    """Which score decides; None for none."""
    found = config.allocation or config.scores
    return found.method if found is not None else config.score
