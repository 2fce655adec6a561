"""Images for the tiny models of vision and language of `architectures.py`, as processors would give them.

Each type takes images in its own form. `FORMS` lists the known ones; a form fits a model if its forward accepts the
names, runs, and outputs something else for another image. No model is known by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny_architectures import Case
from torch import Tensor
from transformers import PreTrainedConfig

_SIDE = 4  # patches along a side of an image that is a list of patches
_BEFORE = 2  # tokens of text before the image

Inputs = dict[str, Tensor]


class NoImagesError(Exception):
    """No known form of images fits a model; the text is the last error."""


@dataclass(frozen=True)
class Form:
    """How a model takes images.

    Attributes:
        make: config of the model, number of samples, seed -> inputs beside the text.
        tokens: number of image tokens of a sample.
    """

    make: Callable[[Any, int, int], Inputs]
    tokens: int


def with_images(case: Case, model: Any, ids: Tensor) -> Inputs:
    """Inputs with the tokens `ids` and an image for each sample.

    Raises:
        NoImagesError: none can be made for this type.
    """
    return _inputs(model, form_of(case), ids, 2)


def form_of(case: Case) -> Form:
    """The form of images of a type.

    Raises:
        NoImagesError: no known form fits.
    """
    found = _form_of(case.group + case.type)
    if isinstance(found, str):
        raise NoImagesError(found)
    return found


@cache
def _form_of(kind: str) -> Form | str:
    """The form, or why there is none."""
    model, why = Case(kind).build(), "its forward takes no known form of images"
    for make in FORMS:
        try:
            needed = {*make(model.config, 2, 0)}
        except (AttributeError, TypeError):  # a config that lacks a size of this form
            continue
        if not needed <= {*inspect.signature(model.forward).parameters}:
            continue
        for tokens in _counts(model, make):
            form = Form(make, tokens)
            try:
                one, other = (_run(model, _inputs(model, form, torch.full((2, 9), 7), seed)) for seed in (2, 3))
            except Exception as error:  # whatever a model raises on inputs of another form
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
                continue
            if one.isfinite().all() and not torch.equal(one, other):
                return form
            why = "its outputs do not depend on the images"
    return why


def _counts(model: Any, make: Any) -> Iterator[int]:
    """The possible numbers of image tokens of a sample: that of the features of its image, or none."""
    if hasattr(model, "get_image_features"):
        accepted = inspect.signature(model.get_image_features).parameters
        given = make(model.config, 2, 0)
        try:
            with torch.no_grad():
                found: Any = model.get_image_features(**{k: v for k, v in given.items() if k in accepted})
            features = getattr(found, "pooler_output", found)
            each = [features] if isinstance(features, Tensor) else [*features]
            count = sum(t.numel() // t.shape[-1] for t in each)
            if count and count % 2 == 0:
                yield count // 2
        except Exception:  # whatever a model raises on inputs of another form
            pass
    yield from (4, 1, 0)


def _inputs(model: Any, form: Form, ids: Tensor, seed: int) -> Inputs:
    config, samples = model.config, len(ids)
    accepted = inspect.signature(model.forward).parameters
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if image is None and "image_embeds_position_mask" in accepted:  # which says where images are
        image = 90
    start, end = (getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end"))
    middle = [image] * form.tokens if image is not None else []
    if middle and start is not None and end is not None:
        middle = [start, *middle, end]
    tokens = torch.tensor([middle] * samples, dtype=torch.long)
    ids = torch.cat([ids[:, :_BEFORE], tokens, ids[:, _BEFORE:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == (-1 if image is None else image)).long()
    found |= {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
    if "qformer_input_ids" in accepted:
        found |= {"qformer_input_ids": ids[:, :4].clone(), "qformer_attention_mask": torch.ones(samples, 4).long()}
    if "image_embeds_position_mask" in accepted:
        found["image_embeds_position_mask"] = kinds
    written = {"decoder_input_ids": ids[:, :4].clone()} if config.is_encoder_decoder else {}
    return {**found, **written, **form.make(config, samples, seed)}


def _run(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return next(t for t in found.values() if isinstance(t, Tensor) and t.is_floating_point())


def _vision(config: Any) -> Any:
    """The config of the vision tower: the first one inside that has images or patches, else the model's own."""
    for field, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and not field.startswith("_") and "text" not in field:
            found = _vision(inner)
            if any(hasattr(found, name) for name in ("image_size", "patch_size", "patch_embed_hidden_size")):
                return found
    return config


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _size(vision: Any) -> tuple[int, int]:
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _channels(vision: Any) -> int:
    names = ("in_channels", "num_channels", "in_chans")
    return next((int(getattr(vision, name)) for name in names if hasattr(vision, name)), 3)


def _frames(vision: Any) -> int:
    return int(getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)))


def _patch(vision: Any) -> int:
    return int(vision.patch_size) if isinstance(vision.patch_size, int) else int(vision.patch_size[0])


def _grid(samples: int) -> Inputs:
    return {"image_grid_thw": torch.tensor([[1, _SIDE, _SIDE]] * samples)}


def _packed(config: Any, samples: int, seed: int) -> Inputs:
    """All patches of all images in one list, each as one row."""
    width = _channels(_vision(config)) * _frames(_vision(config)) * _patch(_vision(config)) ** 2
    return {"pixel_values": _random(seed, _SIDE**2 * samples, width), **_grid(samples)}


def _packed_and_merged(config: Any, samples: int, seed: int) -> Inputs:
    return {**_packed(config, samples, seed), "image_merge_sizes": torch.tensor([2] * samples)}


def _packed_of_one(config: Any, samples: int, seed: int) -> Inputs:
    """The same of one frame, with rows, columns and channels apart."""
    patch = _patch(_vision(config))
    return {
        "pixel_values": _random(seed, _SIDE**2 * samples, _channels(_vision(config)), patch, patch),
        **_grid(samples),
    }


def _packed_flat(config: Any, samples: int, seed: int) -> Inputs:
    return {
        "pixel_values": _random(seed, _SIDE**2 * samples, _channels(_vision(config)) * _patch(_vision(config)) ** 2),
        **_grid(samples),
    }


def _blocks(config: Any, samples: int, seed: int) -> Inputs:
    """Squares of four patches with the channels last, beside the number of squares of each image."""
    side, grid = 2 * _patch(_vision(config)), torch.tensor([[1, 2, 2]] * samples)
    return {"pixel_values": _random(seed, 4 * samples, side, side, _channels(_vision(config))), "image_grid_thw": grid}


def _cubes(config: Any, samples: int, seed: int) -> Inputs:
    """Patches of several frames, with the channels last."""
    vision, patch = _vision(config), _patch(_vision(config))
    return {"pixel_values": _random(seed, 4 * samples, vision.temporal_patch_size, patch, patch, _channels(vision))}


def _images(config: Any, samples: int, seed: int) -> Inputs:
    return {"pixel_values": _random(seed, samples, _channels(_vision(config)), *_size(_vision(config)))}


def _sized(config: Any, samples: int, seed: int) -> Inputs:
    """Images beside their sizes."""
    return {**_images(config, samples, seed), "image_sizes": torch.tensor([_size(_vision(config))] * samples)}


def _tiled(config: Any, samples: int, seed: int) -> Inputs:
    """Each image as a list of tiles: the whole, and one part."""
    tiles = _random(seed, samples, 2, _channels(_vision(config)), *_size(_vision(config)))
    return {"pixel_values": tiles, "image_sizes": torch.tensor([_size(_vision(config))] * samples)}


def _masked(config: Any, samples: int, seed: int) -> Inputs:
    """Several images a sample, with a mask of pixels."""
    height, width = _size(_vision(config))
    mask = torch.ones(samples, 1, height, width, dtype=torch.bool)
    return {
        "pixel_values": _random(seed, samples, 1, _channels(_vision(config)), height, width),
        "pixel_attention_mask": mask,
    }


def _counted(config: Any, samples: int, seed: int) -> Inputs:
    """The same with a mask of images."""
    mask = torch.ones(samples, 1, dtype=torch.bool)
    return {**_several(config, samples, seed), "pixel_attention_mask": mask}


def _in_two_sizes(config: Any, samples: int, seed: int) -> Inputs:
    """Images, and the same ones for a second tower."""
    size, own = config.high_res_vision_config.image_size, _images(config.vision_config, samples, seed)
    return {**own, "high_res_pixel_values": _random(seed, samples, 3, size, size)}


def _several(config: Any, samples: int, seed: int) -> Inputs:
    return {"pixel_values": _random(seed, samples, 1, _channels(_vision(config)), *_size(_vision(config)))}


def _shaped(config: Any, samples: int, seed: int) -> Inputs:
    """Patches in rows for each image, beside the shape of the image."""
    patches = _random(seed, samples, _SIDE**2, _channels(_vision(config)) * _patch(_vision(config)) ** 2)
    mask = torch.ones(samples, _SIDE**2, dtype=torch.long)
    shapes = torch.tensor([[_SIDE, _SIDE]] * samples)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _placed(config: Any, samples: int, seed: int) -> Inputs:
    """Patches in rows for each image, beside their places."""
    places = torch.tensor([[x, y] for y in range(_SIDE) for x in range(_SIDE)])
    patches = torch.rand(
        samples,
        _SIDE**2,
        _channels(_vision(config)) * _patch(_vision(config)) ** 2,
        generator=torch.Generator().manual_seed(seed),
    )
    return {"pixel_values": patches, "image_position_ids": places.expand(samples, -1, -1).contiguous()}


def _strip(config: Any, samples: int, seed: int) -> Inputs:
    """All patches of all images side by side, beside the shapes of the images."""
    patch = _patch(_vision(config))
    pixels = _random(seed, 1, _channels(_vision(config)), patch, patch * _SIDE**2 * samples)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[_SIDE, _SIDE]] * samples, dtype=torch.int)}


def _crossed(config: Any, samples: int, seed: int) -> Inputs:
    """Tiles that the text attends to (Mllama)."""
    tiles = int(_vision(config).max_num_tiles)
    pixels = _random(seed, samples, 1, tiles, _channels(_vision(config)), *_size(_vision(config)))
    ids, mask = torch.ones(samples, 1, dtype=torch.long), torch.ones(samples, 1, tiles, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _flattened(config: Any, samples: int, seed: int) -> Inputs:
    """Rows of a row number, a column number and a patch."""
    places = torch.tensor([[y + 1, x + 1] for y in range(_SIDE) for x in range(_SIDE)]).float()
    vision = _vision(config)
    width = getattr(vision, "patch_embed_hidden_size", None) or _channels(vision) * _patch(vision) ** 2
    patches = _random(seed, samples, _SIDE**2, width)
    return {"flattened_patches": torch.cat([places.expand(samples, -1, -1), patches], -1)}


# In this order: the first that fits is taken.
FORMS: tuple[Callable[[Any, int, int], Inputs], ...] = (
    _packed_and_merged,
    _packed,
    _packed_flat,
    _packed_of_one,
    _blocks,
    _shaped,
    _placed,
    _strip,
    _crossed,
    _flattened,
    _tiled,
    _sized,
    _masked,
    _counted,
    _in_two_sizes,
    _images,
    _several,
    _cubes,
)
