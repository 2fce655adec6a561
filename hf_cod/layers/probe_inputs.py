"""A small input on which any transformers model runs, to find out what its forward does."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_cod.io.text import Batch
from hf_cod.layers.capturing import capturing_restored
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.modes import modes_restored
from hf_cod.layers.stacks import has_two_towers
from hf_cod.layers.task import model_inputs

FEW = 8  # tokens
_OF_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels", "token_type_ids"}


def probe_inputs(
    model: Any, batch: Batch | None = None, device: torch.device | None = None, tokens: int = FEW
) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
    """The inputs of one sample, and the device context in which the forward has to run.

    Args:
        model: a transformers model, which may be on the meta device.
        batch: of text the first `tokens` tokens of the first sample are used, else all of it; None: an input by the
            model's config.
        device: where the model runs; None: that of its weights, the meta device also if they are offloaded.
        tokens: the number of tokens of text.
    """
    first = next(model.parameters())
    device = device or (first.device if first.is_meta else execution_device(model))
    inputs = _by_config(model, tokens) if batch is None else _first_sample(model, model_inputs(model, batch), tokens)
    dtype = first.dtype if first.is_floating_point() else torch.float32
    inputs = {name: t.to(dtype) if batch is None and t.is_floating_point() else t for name, t in inputs.items()}
    # What forward creates is on the model's device, also while from_pretrained builds everything on the meta device.
    meta = "meta" in (device.type, torch.get_default_device().type)
    return to_device(inputs, device), torch.device(device) if meta else nullcontext()


def _first_sample(model: Any, batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    text = _OF_TEXT.issuperset(batch)
    if not text:  # whole, because images may be packed into one list of patches
        return batch
    # Without the mask: all of the first tokens may be padding.
    return {name: _first_tokens(model, t, tokens) for name, t in batch.items() if name.endswith("input_ids")}


def _first_tokens(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """Those of the first sample, with its end token in the last place, which some classifiers read (BART)."""
    cut = ids[:1, ..., :tokens]
    known = getattr(getattr(model, "config", None), "eos_token_id", None)
    ends = torch.tensor([known] if isinstance(known, int) else known or [], device=ids.device)
    found = ids[:1][torch.isin(ids[:1], ends)]
    if len(found) and not torch.isin(cut, ends).any():
        cut = cut.clone()
        cut[..., -1] = found[0]
    return cut


def _by_config(model: Any, tokens: int) -> dict[str, Tensor]:
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    ids = torch.arange(tokens, device="cpu")[None] % FEW + 1  # small ones, which every vocabulary has
    inputs = {"input_ids": ids}
    if main == "pixel_values" or has_two_towers(model):
        pixels = _pixels(getattr(config, "vision_config", config))
        inputs = {**pixels, **(inputs if has_two_towers(model) else {})}
    elif main == "input_features":  # log-mel spectra, such as Whisper's, which has a fixed length
        frames = 2 * getattr(config, "max_source_positions", 50)
        inputs = {main: torch.zeros(1, getattr(config, "num_mel_bins", 80), frames, device="cpu")}
    elif main == "input_values":  # sound
        inputs = {main: torch.zeros(1, 4000, device="cpu")}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def image_inputs(model: Any) -> dict[str, Tensor] | None:
    """One sample of text with an image, for a model that reads both; None for other models, or if none can be made.

    The image is given as pixels, or as patches if the model reads `image_grid_thw`.
    """
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    accepted = inspect.signature(model.forward).parameters
    if vision is None or not {"input_ids", "pixel_values"} <= accepted.keys():
        return None
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    try:
        made = _patches(vision) if "image_grid_thw" in accepted else _pixels(vision)
        if "high_res_pixel_values" in accepted:  # a second tower that reads the same image
            made["high_res_pixel_values"] = _pixels(config.high_res_vision_config)["pixel_values"]
        inputs = to_device(made, execution_device(model))
        dtype = next(model.parameters()).dtype
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        places = [] if token is None else [token] * _count_features(model, inputs)
    except Exception:  # whatever a model raises whose images have another form
        return None
    inputs["input_ids"] = torch.tensor([[1, 2, *places, 3, 4]], device="cpu")
    if token is not None and "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
    return inputs


@torch.no_grad()
def _count_features(model: Any, inputs: dict[str, Tensor]) -> int:
    """The number of tokens that an image takes in the text."""
    reader = model if hasattr(model, "get_image_features") else model.base_model
    with modes_restored(model), capturing_restored(model):
        found = reader.eval().get_image_features(**inputs)
    features = getattr(found, "pooler_output", found)
    each = features if isinstance(features, (tuple, list)) else [features]
    return sum(t.numel() for t in each) // model.config.get_text_config().hidden_size


def _patches(vision: Any) -> dict[str, Tensor]:
    """An image of 2 x 2 tokens, each merged from several patches, one row for each patch."""
    side = 2 * vision.spatial_merge_size
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": _noise(side**2, width), "image_grid_thw": torch.tensor([[1, side, side]], device="cpu")}


def _pixels(vision: Any) -> dict[str, Tensor]:
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": _noise(1, getattr(vision, "num_channels", 3), height, width)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
