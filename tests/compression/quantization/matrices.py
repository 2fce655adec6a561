"""Matrices in three and four bits, and tiny models with them."""

from __future__ import annotations

import torch
from torch import nn

from hf_cod import OwlBnbConfig, quantize
from hf_cod.compression.quantization import bnb_decoding
from hf_cod.compression.quantization.format import expand_planes
from hf_cod.compression.quantization.rounding import fill, new_module, round_matrix
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.functional.codebook import decode
from tests.tiny_models import build

# (out, in): whole blocks, and widths that are no multiple of a block, of eight, of 32 outputs.
SHAPES = [(64, 128), (37, 64), (5, 344), (48, 12), (3, 7), (1, 1)]


def quantized(shape, bits, *, bias=True, block=64, double_quant=True, dtype=torch.float32, compute_dtype=None):
    """A module that holds a random matrix."""
    out, width = shape
    linear = nn.Linear(width, out, bias=bias).to(dtype)
    storage = StorageSettings(block=block, double_quant=double_quant)
    module = new_module(linear, bits, storage, compute_dtype)
    fill(module, round_matrix(linear.weight.detach(), bits, storage, "linear"))
    return module


def naive(module):
    """W (out, in) of a module, out of its tensors by the format's description and the codebook."""
    scales = bnb_decoding.dequantize_scales(*module.scales()).view(module.out_features, -1)
    codes = module.weight.detach()
    b = expand_planes(codes) if module.bits == 3 else codes.view(module.out_features, -1)
    nibbles = torch.stack([b >> 4, b & 15], -1).flatten(1)
    W = decode(nibbles >> 1, scales, 3, module.block) if module.bits == 3 else decode(nibbles, scales, 4, module.block)
    return W[:, : module.in_features]


def llama(**changes):
    """Widths of whole blocks: 64 and 128."""
    return build("llama", hidden_size=64, intermediate_size=128, **changes)


def mixed(family="llama", layers=4, dtype=torch.float32, **options):
    """A model whose even layers have four bits and whose odd ones have three."""
    model = llama(layers=layers, dtype=dtype) if family == "llama" else build(family, layers, dtype)
    return mix(model, **options)


def mix(model, **options):
    from hf_cod.compression.quantization.quantizable import quantizable
    from hf_cod.layers.stack import find_decoder_layers

    layers, _ = quantizable(find_decoder_layers(model), StorageSettings())
    modules = {name: 3 + (index % 2 == 0) for index, layer in enumerate(layers) for name in layer}
    quantize(model, OwlBnbConfig(modules=modules, **options))
    return model
