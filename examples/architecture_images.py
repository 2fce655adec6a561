"""Images for the tiny models of vision and language of `architectures.py`, as processors would give them.

Each type takes images in its own form, which `architecture_image_forms.py` makes. A form fits a model if its forward
accepts the names, runs, and outputs something else for another image. No model is known by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from architecture_image_forms import FORMS, Inputs
from tiny_architectures import Case
from torch import Tensor

_BEFORE = 2  # tokens of text before the image


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
