"""Which matrices were pruned: they have zeros that are to stay."""

from __future__ import annotations

from torch import Tensor, nn

from hf_cod.decoder_layers import DecoderLayers

# Share of zeros from which on a matrix counts as pruned: a few are there by chance, of weights that were rounded.
LEAST_SHARE = 0.01


def is_pruned(weight: Tensor) -> bool:
    """Whether at least `LEAST_SHARE` of the entries is 0."""
    return int((weight == 0).sum()) >= LEAST_SHARE * weight.numel()


def pruned_matrices(stack: DecoderLayers) -> list[nn.Parameter]:
    """Weights of the layers' matrices, banks of experts included, that are pruned."""
    found = [p for layer in stack for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()]
    return [p for p in found if is_pruned(p)]
