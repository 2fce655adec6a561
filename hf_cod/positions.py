"""How many positions a model has learnt: longer samples than that have no embedding to look up."""

from __future__ import annotations

from torch import nn

# Names of embeddings of learnt positions: GPT-2's, OPT's and BERT's kinds. Rotary ones have no such table and no limit.
_TABLES = ("wpe", "embed_positions", "position_embeddings")


def check_length(model: nn.Module, length: int) -> None:
    """Makes sure that samples of `length` tokens fit a model whose positions are learnt.

    Raises:
        ValueError: they are longer than its table of positions; says how long they may be.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT's table has two rows in front of the first position, RoBERTa's those up to its padding.
            offset = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            if length > module.num_embeddings - offset:
                raise ValueError(
                    f"sequence_length: expected at most {module.num_embeddings - offset} tokens, for which {name} has "
                    f"positions, got {length}"
                )
