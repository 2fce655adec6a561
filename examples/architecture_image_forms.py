"""The forms in which models of vision and language take images, for `architecture_images.py`.

Each is made from the config of a model, the number of samples, and a seed for the random pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_SIDE = 4  # patches along a side of an image that is a list of patches

Inputs = dict[str, Tensor]


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
