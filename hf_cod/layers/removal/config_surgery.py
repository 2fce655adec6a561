"""Makes a config describe a shorter stack: its counts, its lists by layer and its lists of layer indices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from hf_cod.io.display import one_line
from hf_cod.io.unread_weights import promises, withdraw
from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.list_readings import Meanings, apply
from hf_cod.layers.removal.wording import Wording
from hf_cod.layers.stacks import COUNT_FIELDS, DECODER, DECODER_COUNT_FIELDS, ENCODER_COUNT_FIELDS, counts

# Config fields that list the layers of one kind by index.
INDEX_LIST_FIELDS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "cross_attention_layers",
    "global_attn_indexes",
    "fullatt_block_indexes",
    "window_block_indices",
    "residual_block_indices",
)
# Config fields that count leading layers of one kind.
LEADING_COUNT_FIELDS = ("first_k_dense_replace", "max_window_layers")
# Config fields that count the last layers of one kind.
TRAILING_COUNT_FIELDS = ("num_kv_shared_layers",)
# Config fields that count layers of several kinds, one kind after the other.
CONSECUTIVE_COUNT_FIELDS = (("n_input_layers", "n_recurrent_layers", "n_output_layers"),)
# Lists that may have as many entries as there are layers, but are not per layer.
NOT_PER_LAYER_FIELDS = (
    "architectures",
    "attention_types",  # pairs of a pattern and a number of repeats, written from `attention_layers`
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "keys_to_ignore_at_inference",
    "label2id",
    "id2label",
    "begin_suppress_tokens",
    "suppress_tokens",
    "forced_decoder_ids",
    "image_size",
    "patch_size",
    "out_features",
    "out_indices",
    "stage_names",
    "deepstack_visual_indexes",
    "intermediate_layers_indices",
)
# What transformers raises for a config that it cannot describe or build.
_OF_BUILDING = (TypeError, AttributeError, LookupError, ArithmeticError, NotImplementedError, StrictDataclassError)
_OWN = re.compile(r"[a-z_]+: expected ")  # errors of this package


@contextmanager
def building_errors(model: nn.Module, wording: Wording) -> Iterator[None]:
    """Turns the errors of config classes for values that they cannot describe into one ValueError."""
    try:
        yield
    except (ValueError, *_OF_BUILDING) as error:
        if _OWN.match(str(error)):
            raise
        raise ValueError(
            f"layers: expected {wording.layers}s that the config of {type(model).__name__} can describe, "
            f"got {type(error).__name__}: {one_line(str(error))}; use {wording.temporary}"
        ) from error


def mend_config(config: Any, depth: int, kept: list[int], changes: Changes, side: str | None = None) -> None:
    """Changes `config` so that it describes only the `kept` layers, given by their old indices.

    Args:
        config: a config that counts the layers.
        depth: their number before.
        kept: the layers that are left.
        changes: records what is changed.
        side: "encoder" or "decoder" if the config is that of both; the other side's numbers stay as they are.
    """
    if hasattr(config, "layer_depths") and config.layer_depths is None:
        # Models of this package: LNS, Mix-LN and DeepNorm depend on a layer's depth, which must not change here.
        changes.set(config, "layer_depths", list(range(depth)))
        changes.set(config, "original_num_hidden_layers", depth)
    counting = _counting_fields(config, depth, side)
    if side is not None and not counting:  # each side has its own config inside this one
        return
    _mend_lists(config, depth, kept, changes, side, Meanings(config, counting, depth, NOT_PER_LAYER_FIELDS))
    for name in counting:
        changes.set(config, name, len(kept))
    _mend_overrides(config, kept, changes)
    for names in CONSECUTIVE_COUNT_FIELDS:
        _mend_consecutive(config, names, kept, changes)
    if "attention_types" in vars(config) and "attention_layers" in vars(config):  # GPT-Neo
        changes.set(config, "attention_types", [[[kind], 1] for kind in config.attention_layers])
    if side is not None:
        _mend_cache_depth(config, changes)
    _withdraw_promises(config, changes)


def _withdraw_promises(config: Any, changes: Changes) -> None:
    """Sets the numbers of layers for multi-token prediction to 0: they are in the files only, numbered after the
    model's own layers, and `save_pretrained` does not write them.
    """
    text, before = config.get_text_config(), promises(config)
    for name in withdraw(config):
        changes.call(partial(setattr, text, name, before[name]))


def _counting_fields(config: Any, depth: int, side: str | None) -> list[str]:
    """The fields that count the layers of a stack, or of one side of an encoder-decoder."""
    own = DECODER_COUNT_FIELDS if side == DECODER else ENCODER_COUNT_FIELDS
    names = [name for name in own if counts(config, name) == depth] if side else []
    # ProphetNet's config only reads num_hidden_layers.
    only_read = isinstance(getattr(type(config), "num_hidden_layers", None), property)
    others = [name for name in COUNT_FIELDS if not (only_read and name == "num_hidden_layers")]
    if side is None:
        names = [name for name in others if counts(config, name) == depth]
    elif not names and side != DECODER:  # T5 counts its encoder's layers so
        names = ["num_hidden_layers"] if counts(config, "num_hidden_layers") == depth else []
    return names


def _mend_cache_depth(config: Any, changes: Changes) -> None:
    """Makes room for all layers of the decoder in the KV cache.

    `generate` sizes it by `config.get_text_config(decoder=True)`, which takes the encoder's number where a config has
    no field `decoder_layers`, as T5's.
    """
    wanted = next((count for name in DECODER_COUNT_FIELDS if (count := counts(config, name)) is not None), 0)
    if cache_depth(config) >= wanted or "decoder_layers" in vars(config):
        return
    attempt = Changes()
    attempt.add(config, "decoder_layers", wanted)
    try:
        cache_depth(config)
    except NotImplementedError:  # ProphetNet's config only reads num_hidden_layers
        attempt.undo()
        return
    attempt.undo()
    changes.add(config, "decoder_layers", wanted)


def cache_depth(config: Any) -> int:
    """The number of layers in the KV cache that transformers makes for a config."""
    return config.get_text_config(decoder=True).num_hidden_layers


def _mend_lists(
    config: Any, depth: int, kept: list[int], changes: Changes, side: str | None, meanings: Meanings
) -> None:
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name in NOT_PER_LAYER_FIELDS:
            continue
        if side is not None and name.startswith(DECODER) != (side == DECODER):
            continue
        if name in INDEX_LIST_FIELDS and value is not None:
            changes.set(config, name, [new for new, old in enumerate(kept) if old in value])
        elif name in LEADING_COUNT_FIELDS and value is not None:
            changes.set(config, name, sum(old < value for old in kept))
        elif name in TRAILING_COUNT_FIELDS and value is not None:
            changes.set(config, name, sum(old >= depth - value for old in kept))
        elif meanings.possible(value) and (reading := meanings.reading(name, value, kept)) is not None:
            apply(reading, changes)


def _mend_consecutive(config: Any, names: Sequence[str], kept: list[int], changes: Changes) -> None:
    start = 0
    for name in names:
        count = vars(config).get(name)
        if count is not None:
            changes.set(config, name, sum(start <= old < start + count for old in kept))
            start += count


def derived_lists(config: Any, depth: int) -> dict[str, list[Any]]:
    """Name -> list by layer, for those that a config computes, as Jamba's kinds of layers from their period.

    Args:
        config: a config that counts the layers.
        depth: their number.
    """
    found = {}
    for name in dir(type(config)):
        if not isinstance(getattr(type(config), name, None), property) or hasattr(PreTrainedConfig, name):
            continue
        try:
            value = getattr(config, name)
        except Exception:  # whatever a property raises for a config that it does not describe
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth:
            found[name] = [*value]
    return found


def other_lists(config: Any, before: dict[str, list[Any]], kept: list[int]) -> dict[str, list[Any]]:
    """Those of the `derived_lists` that a shortened config computes otherwise than for the kept layers: name -> theirs.

    Args:
        config: the config after the change.
        before: its lists before.
        kept: the layers that are left, by their old indices.
    """
    after = derived_lists(config, len(kept))
    wanted = {name: [value[i] for i in kept] for name, value in before.items()}
    return {name: value for name, value in wanted.items() if after.get(name) != value}


def write_out(config: Any, before: dict[str, list[Any]], kept: list[int], changes: Changes) -> dict[str, list[Any]]:
    """Writes out the pattern from which a config computes lists by layer (RecurrentGemma's `block_types`), if the kept
    layers do not follow it; returns the lists that it still computes otherwise, as `other_lists`.
    """
    others = other_lists(config, before, kept)
    for name, pattern in [*vars(config).items()] if others else []:
        if isinstance(pattern, (list, tuple)) and pattern and not name.startswith("_"):
            attempt = Changes()
            attempt.set(config, name, type(pattern)(pattern[i % len(pattern)] for i in kept))
            if len({*map(str, pattern)}) > 1 and not other_lists(config, before, kept):
                written = getattr(config, name)
                attempt.undo()
                changes.set(config, name, written)
                return {}
            attempt.undo()
    return others


def pin_lists(config: Any, lists: dict[str, list[Any]], changes: Changes) -> None:
    """Makes a config give these lists instead of those that it computes."""
    if lists:
        own: Any = type(config)
        changes.set(config, "__class__", type(own)(own.__name__, (own,), lists))


def _mend_overrides(config: Any, kept: list[int], changes: Changes) -> None:
    """Renumbers `per_layer_config`; its public form reads as whole configs, so the overrides are taken from below."""
    stored = vars(config).get("_heterogeneity_spec")
    if stored is not None:
        old = stored.per_layer_overrides
        overrides = {new: old[index] for new, index in enumerate(kept) if index in old}
        changes.set(config, "_heterogeneity_spec", dataclasses.replace(stored, per_layer_overrides=overrides))
