"""The kinds of models that `architectures.py` checks, with the stacks that have to be named."""

from __future__ import annotations

from tiny_architectures import ENCODER, LANGUAGE, SEQ2SEQ, VISION, WITH_IMAGES, auto_classes

# Kinds without a default stack -> their stacks: towers beside each other, layers that run in turn, and layers whose
# halves the config counts.
SIDES = ("text", "vision")
BY_PATH = {
    "hrm_text": ("model.L_module.layers", "model.H_module.layers"),
    "longcat_flash": ("model.layers",),
}


def kinds() -> list[str]:
    """Every kind: causal models, encoder-decoders, encoders, vision models, and those of vision and language."""
    found = [group + kind for group in ("", SEQ2SEQ, ENCODER, VISION, LANGUAGE) for kind in sorted(auto_classes(group))]
    towers = {LANGUAGE + kind: SIDES for kind, name in auto_classes(LANGUAGE).items() if name == "AutoModel"}
    by_name = {**BY_PATH, **towers}
    found = [kind for kind in found if kind not in by_name]
    found += [f"{kind}@{stack}" for kind, stacks in by_name.items() for stack in stacks]
    readers = [kind for kind in found if kind.startswith(LANGUAGE) and "@" not in kind]
    return found + [f"{kind}{WITH_IMAGES}{side}" for kind in readers for side in ("", "@vision")]
