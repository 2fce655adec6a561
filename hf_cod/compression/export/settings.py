"""Settings of `export`, and the names of its targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_cod.compression.search.settings import DEFAULT_PASSES
from hf_cod.io.arguments import checked
from hf_cod.io.module_names import ModuleFields, ModuleSettings, Names, check_names
from hf_cod.io.settings import SampleFields, as_in, check_choice, check_effect, check_least

# Target -> what is written. `targets.TARGETS` has the functions.
TARGETS = {
    "compressed-tensors": "a checkpoint for vLLM and transformers, with error compensation",
    "llama.cpp": "types of tensors, an importance matrix and the command line of llama-quantize",
    "gptqmodel": "quantize_config.json of GPTQModel",
    "auto-round": "layer_config.json of AutoRound",
    "mlx": "the entry quantization of config.json, and sensitivities.json of mlx_lm.dynamic_quant",
    "exl3": "override.yaml of ExLlamaV3's recompile.py",
}
GROUPS = (128, 64, 32)
EMBEDDING_BITS = (4, 5, 6, 8)


@checked
@dataclass(kw_only=True)
class ExportSettings(ModuleSettings):
    """The engine, the number of bits, and the matrices to quantize."""

    to: str = field(
        default="compressed-tensors",
        metadata={
            "help": "the engine that is to run the model: " + "; ".join(f"{name}: {t}" for name, t in TARGETS.items()),
            "choices": list(TARGETS),
        },
    )
    bits: float = field(
        default=3.6,
        metadata={
            "help": "mean of the stored bits per weight in the format of the engine, scales included; layers with the "
            "highest scores get the next larger width of the engine"
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "number of adjacent weights of a row that share a scale: 128, 64 or 32, for engines with a choice; "
            "default: the largest of them that divides all rows",
            "choices": list(GROUPS),
        },
    )
    search: bool = field(
        default=False,
        metadata={
            "help": "search for the widths of the matrices by the divergence of the rounded model, among all widths of "
            "the engine near the budget; it starts from plans by scores; default: off"
        },
    )
    passes: int = field(
        default=DEFAULT_PASSES,
        metadata={"help": "cost of --search: maximum number of forward passes of one sample through a rounded model"},
    )
    embedding_bits: int = field(
        default=8,
        metadata={
            "help": "for llama.cpp: width of the embedding and the head, which --bits does not count: 4, 5, 6 or 8",
            "choices": list(EMBEDDING_BITS),
        },
    )
    search_embedding: bool = field(
        default=False,
        metadata={
            "help": "for llama.cpp: --search also chooses the width of the embedding and the head; the size stays that "
            "of --bits and --embedding-bits together; default: off"
        },
    )
    gguf: str | None = field(
        default=None,
        metadata={
            "help": "for llama.cpp: a GGUF of the model before it was narrowed, whose tokenizer is copied into a GGUF "
            "that is written for llama-quantize, of architecture deci: layers of Llama's kind with sizes of their own; "
            "default: none is written"
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        check_names(self)
        check_choice("to", self.to, TARGETS)
        if not 0 < self.bits < math.inf:
            raise ValueError(f"bits: expected stored bits per weight, such as 3.6, got {self.bits}")
        if self.group_size is not None and self.group_size not in GROUPS:
            raise ValueError(f"group_size: expected {', '.join(map(str, GROUPS))}, got {self.group_size}")
        check_least(self, passes=1)
        if not self.search:
            check_effect(self, ["passes", "search_embedding"], "no search")
        if self.embedding_bits not in EMBEDDING_BITS:
            known = ", ".join(map(str, EMBEDDING_BITS))
            raise ValueError(f"embedding_bits: expected one of {known}, got {self.embedding_bits}")
        if self.to != "llama.cpp":
            check_effect(
                self,
                ["embedding_bits", "search_embedding"],
                f"{self.to}, whose embedding and head we leave as they are",
            )
        if self.gguf is not None and self.to != "llama.cpp":
            raise ValueError(f"gguf: expected none for {self.to}, which reads no GGUF, got {self.gguf!r}")


class ExportFields(ModuleFields, SampleFields, total=False):
    """Fields of `ExportSettings`, and of samples, that `export` takes by name."""

    to: str
    bits: float
    group_size: int | None
    search: bool
    passes: int
    embedding_bits: int
    search_embedding: bool
    gguf: str | None
