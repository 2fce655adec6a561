"""OwlBnbConfig: three or four bits for each matrix, as a `quantization_config` of transformers."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.quantization.settings import QuantizeSettings, StorageFields, check_mixture
from hf_cod.compression.quantization.widths import Width, is_width
from hf_cod.compression.stored_quantization import StoredQuantization
from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked, shown
from hf_cod.io.module_names import FIELDS, ModuleFields
from hf_cod.io.schema import brief, check_fields
from hf_cod.io.settings import SampleFields, check_effect
from hf_cod.layers.replacement_modules import INSTALL
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores

METHOD = "owl_bnb"
# Used for quantizing, and not saved in config.json.
_NOT_SAVED: dict[str, Any] = {
    "scores": LayerScores,
    "allocation": LayerAllocation,
    "statistics": LayerStatistics,
    "expert_scores": ExpertScores,
}


@checked
@dataclass(kw_only=True)
class OwlBnbConfig(QuantizeSettings, StoredQuantization):
    """Three bits for the matrices of layers with low scores, bitsandbytes' NF4 for the others.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=OwlBnbConfig(bits=3.5, scores=scores))

    Passed to `from_pretrained` with a stock checkpoint, it quantizes the model while loading. A quantized checkpoint
    contains its own config. `hf_cod.quantize` works on a loaded model; with batches it adds error compensation (GPTQ).

    Attributes:
        bits: stored bits a weight, scales included, over all quantized matrices; 3 or 4 means the same width for all.
        scores: LayerScores or their file; the layers with the highest scores get four bits. None: earlier layers come
            first, as the Curse of Depth suggests for models without scores; that is worse than a measured score.
        allocation: LayerAllocation of bits or its file, instead of bits and scores: 3 or 4 for each layer, or a value
            between them for a layer with matrices of both widths.
        expert_scores: ExpertScores or their file: what all tokens enter (attention, shared experts) gets four bits
            first, then the experts with the highest scores of all layers. With an allocation they decide within each
            layer.
        statistics: LayerStatistics or their file; with them the search for scales minimizes the error of the outputs.
        skip: parts of module names; matching matrices are not quantized.
        include, exclude: the matrices to quantize, as PEFT's target_modules and exclude_modules. Routers, gates of one
            row and latent projections are quantized only if `include` matches them.
        compute_dtype: torch.dtype or its name in which inputs and decoded weights are multiplied; None: the input's.
        score: the score that was used; filled in.
        modules: name -> bits of each quantized matrix; of the matrices of a bank of experts, which are named after
            their parameter, 3, 4 or a digit for each expert ("3343"); filled in.
        quant_method: the name under which this package is registered in transformers.
        install: an instruction for loading without this package installed; saved in config.json.
    """

    NOT_STORED: ClassVar[Collection[str]] = _NOT_SAVED

    scores: Any = None
    allocation: Any = None
    statistics: Any = None
    expert_scores: Any = None
    compute_dtype: Any = None
    score: str | None = None
    modules: dict[str, Width] = field(default_factory=dict)
    quant_method: Any = METHOD
    install: str = INSTALL

    def __post_init__(self) -> None:
        self.compute_dtype = _compute_dtype(self.compute_dtype)
        check_fields(self)
        super().__post_init__()
        for name, kind in _NOT_SAVED.items():
            value = getattr(self, name)
            if isinstance(value, (str, Path)):
                setattr(self, name, kind.load(value))
            elif value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}: expected {kind.__name__} or a file of {name}, got {shown(value)}")
        if self.modules:
            check_effect(self, FIELDS, "modules, which are the matrices to quantize")
        else:  # a stored config has the bits that resulted
            self._check_bits()
        wrong = {name: bits for name, bits in self.modules.items() if not is_width(bits)}
        if wrong:
            raise ValueError(f"modules: expected {' or '.join(map(str, BITS))} bits each, got {wrong}")

    def _check_bits(self) -> None:
        """Checks that one of bits, scores and allocation determines the bits of the layers."""
        if self.allocation is not None:
            if self.scores is not None:
                raise ValueError("scores: expected none with an allocation, which has the bits of each layer, got both")
            check_effect(self, ["bits"], "an allocation, which has the bits of each layer")
            return
        check_mixture(self.bits, self)
        for name in ("scores", "expert_scores"):
            value = getattr(self, name)
            if value is not None and self.bits in BITS:
                kind = type(value).__name__
                raise ValueError(f"{name}: expected none with bits {self.bits:g}, which uses no scores, got {kind}")

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json."""
        kept = {name: value for name, value in self.__dict__.items() if name not in (*_NOT_SAVED, *FIELDS)}
        if self.compute_dtype is not None:
            kept["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return copy.deepcopy(kept)


class QuantizeFields(ModuleFields, StorageFields, SampleFields, total=False):
    """Fields of `OwlBnbConfig`, and of samples, that `quantize` takes by name."""

    quant_method: Any
    bits: float
    skip: list[str]
    scores: Any
    allocation: Any
    statistics: Any
    expert_scores: Any
    compute_dtype: Any
    score: str | None
    modules: dict[str, Width]
    install: str


def _compute_dtype(given: Any) -> torch.dtype | None:
    """The dtype of a name.

    Raises:
        ValueError: no such dtype, or one that is not a floating-point dtype of at least 16 bits.
    """
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is None and given is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"compute_dtype: expected the name of a dtype such as bfloat16 or float32, got {brief(given)}")
    return found


def score_of(config: OwlBnbConfig) -> str | None:
    """The name of the score by which bits are distributed; None if there is none."""
    found = config.allocation or config.scores or config.expert_scores
    return found.method if found is not None else config.score
