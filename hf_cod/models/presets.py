"""The Llama sizes that the papers on Mix-LN and LayerNorm Scaling train from scratch.

The authors' training settings: C4, sequences of 256 tokens, batches of 512 sequences, Adam without weight decay, cosine
schedule to 10 %; learning rate 1e-3 for 130M and 250M, 5e-4 for 350M and 1B; 20, 40, 60 and 100 thousand steps, of
which 2, 4, 6 and 1 thousand are warm-up.
"""

from typing import Any

from .configuration_cod_llama import CodLlamaConfig

# size -> (hidden, intermediate, layers, heads, positions)
LLAMA_PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "130M": (768, 2048, 12, 12, 1024),
    "250M": (768, 2560, 24, 16, 1024),
    "350M": (1024, 2736, 24, 16, 1024),
    "1B": (2048, 5461, 24, 32, 1024),
    "7B": (4096, 11008, 32, 32, 2048),
}


def llama_preset(size: str, norm_placement: str = "lns", **fields: Any) -> CodLlamaConfig:
    """The configuration of one of the papers' Llama models, with a vocabulary of 32,000 tokens.

    Args:
        size: "130M", "250M", "350M", "1B" or "7B".
        norm_placement: The norm placement.
        **fields: Further fields of `CodLlamaConfig`; they override the preset.

    Raises:
        ValueError: For an unknown size, or an invalid field.
    """
    if not isinstance(size, str) or size not in LLAMA_PRESETS:
        raise ValueError(f"size: expected one of {', '.join(LLAMA_PRESETS)}, got {size!r}")
    hidden, intermediate, layers, heads, positions = LLAMA_PRESETS[size]
    preset = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "vocab_size": 32000,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return CodLlamaConfig(norm_placement=norm_placement, **{**preset, **fields})
