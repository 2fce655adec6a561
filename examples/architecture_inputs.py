"""Batches for the tiny models of `architectures.py`: text, images, sound, or text with images."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from architecture_images import with_images
from tiny_architectures import LANGUAGE, SEQ2SEQ, VISION, Case
from torch import Tensor

IDS = torch.randint(5, 80, (3, 9), generator=torch.Generator().manual_seed(1))
NO_LOSS = ("git", "perceiver")  # types whose loss requires images or text of one length


def batches_for(case: Case, model: Any) -> list[dict[str, Tensor]]:
    """Two batches; those of an encoder-decoder also have tokens for the decoder, a few less than for the encoder."""
    return [inputs(case, model, ids) | _written(model, ids) for ids in (IDS, IDS[:2] + 3)]


def inputs(case: Case, model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model, or the encoder of one, reads: one sample for each row of `ids`."""
    main = model.main_input_name
    if case.images:
        return with_images(case, model, ids)
    if main == "inputs":
        return {main: ids, "attention_mask": torch.ones_like(ids)}
    if main.startswith("pixel_values") or _has_two_towers(model):
        reads_text = case.group == LANGUAGE and not model.config.is_encoder_decoder
        return {**_pixels(model, len(ids)), **(_text(case, model, ids) if reads_text else {})}
    if main == "input_ids" or case.group != SEQ2SEQ:
        return _text(case, model, ids)
    frames = 2 * getattr(model.config, "max_source_positions", 32)
    return {main: _random(len(ids), getattr(model.config, "num_mel_bins", 8), frames)}


def labels(case: Case, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The labels of a batch; none for a model that has no loss."""
    accepted = inspect.signature(model.forward).parameters
    if "labels" not in accepted or case.type in NO_LOSS:
        return {}
    if case.group == VISION:
        return {"labels": torch.zeros(len(next(iter(batch.values()))), dtype=torch.long)}
    found = next((batch[key] for key in ("decoder_input_ids", "input_ids", "inputs") if key in batch), None)
    return {} if found is None else {"labels": found}


def _written(model: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids.flip(1)[:, :7].contiguous()} if model.config.is_encoder_decoder else {}


def _text(case: Case, model: Any, ids: Tensor) -> dict[str, Tensor]:
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # Gemma 3 and PaliGemma require it in training.
    if case.group == LANGUAGE and "token_type_ids" in inspect.signature(model.forward).parameters:
        found["token_type_ids"] = torch.zeros_like(ids)
    return found


def _pixels(model: Any, samples: int) -> dict[str, Tensor]:
    """Images, or videos for a model that has frames; as patches for one that takes images of any size."""
    config = getattr(model.config, "vision_config", model.config)
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 16)
    height, width = (size, size) if isinstance(size, int) else size
    if "spatial_shapes" in inspect.signature(model.forward).parameters:
        patches, side = config.num_patches, int(config.num_patches**0.5)
        shapes = torch.tensor([[side, side]] * samples)
        mask = torch.ones(samples, patches, dtype=torch.long)
        pixels = _random(samples, patches, channels * config.patch_size**2)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    name = model.main_input_name if model.main_input_name.startswith("pixel_values") else "pixel_values"
    return {name: _random(samples, *frames, channels, height, width)}


def _has_two_towers(model: Any) -> bool:
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features") and not model.can_generate()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
