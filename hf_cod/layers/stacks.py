"""The stacks of layers of a model and their names: encoder and decoder, or towers of text, images and sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES

# Config fields that count the layers of one side of an encoder-decoder.
ENCODER_COUNT_FIELDS = ("encoder_layers", "num_encoder_layers")
DECODER_COUNT_FIELDS = ("decoder_layers", "num_decoder_layers")
# Config fields that count the layers of a stack.
COUNT_FIELDS = ("num_hidden_layers", *ENCODER_COUNT_FIELDS, *DECODER_COUNT_FIELDS, "depth", "num_blocks")
ENCODER, DECODER, TEXT, VISION = "encoder", "decoder", "text", "vision"


@dataclass(frozen=True)
class NamedStack:
    """A stack of layers beside others.

    Attributes:
        name: "encoder" or "decoder"; for towers the name of their config in the model's config ("text", "vision",
            "audio"), which is "text" for the model's own config.
        path: name of its module list inside the model.
        depth: number of layers.
    """

    name: str
    path: str
    depth: int


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> module list that is not empty, those inside other lists included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}


def named_stacks(model: Any) -> list[NamedStack]:
    """The stacks of a model that has several; a name is unique, and a stack of which that cannot be said has none."""
    lists = module_lists(model)
    found = []
    for path, layers in lists.items():
        config = counting_config(model, path, len(layers))
        if config is not None and not inside_another(path, lists) and [*layers[0].children()]:
            name = side_of(model, path) or _tower_of(model.config, config)
            if name is not None:
                found.append(NamedStack(name, path, len(layers)))
    names = [stack.name for stack in found]
    found = [stack for stack in found if names.count(stack.name) == 1]
    return found if len(found) > 1 else []


def path_of_stack(model: Any, name: str | None) -> str:
    """The name of a module list of layers inside a model.

    Args:
        model: a transformers model without wrappers.
        name: the stack's name, or that of its module list; None: the default, see `find_decoder_layers`.

    Raises:
        ValueError: there is no such stack, or its elements are stages; without a name, no stack or more than one fits.
    """
    lists = module_lists(model)
    if name in lists:
        return name
    path = _default_path(model, lists) if name is None else _path_of(model, lists, name)
    stages = _stages(model, {path: lists[path]})
    widths = [*map(_norm_widths, stages.values())]
    if widths and all(widths) and not set.intersection(*widths):
        raise ValueError(f"{'model' if name is None else 'stack'}: {_no_stack(model, stages, lists, path)}")
    return path


def side_of(model: Any, path: str) -> str | None:
    """ "encoder" or "decoder" if the module of this name is part of that side of an encoder-decoder, else None."""
    for name, module in _sides(model).items():
        if any(inner is module for inner in ancestors(model, path)):
            return name
    return None


def counting_config(model: nn.Module, path: str, depth: int) -> Any:
    """The config of the nearest module around a module list that counts its layers; None if there is none.

    An encoder-decoder may have one config for both sides, and a tower has its own.
    """
    for module in ancestors(model, path):
        config = text_config(module)
        if any(counts(config, name) == depth for name in COUNT_FIELDS):
            return config
    return None


def counts(config: Any, name: str) -> int | None:
    """The number of layers in a field of `COUNT_FIELDS`; None if a config has no such field."""
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def text_config(module: nn.Module) -> Any:
    """The config of the text that a module writes; the module's own if that has no other inside."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    found = config.get_text_config(decoder=True)
    # Of a config for both sides it is a copy, in which the fields of the decoder have replaced those of the encoder.
    return config if type(found) is type(config) else found


def inside_another(name: str, lists: dict[str, nn.ModuleList]) -> bool:
    """Whether a module list is inside another one, as experts and heads in each layer; these are never a stack."""
    return any(name.startswith(other + ".") for other in lists)


def ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around the module of this name, the nearest first."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:end]))


def _path_of(model: nn.Module, lists: dict[str, nn.ModuleList], name: str) -> str:
    """The module list of the stack with this name."""
    stacks = named_stacks(model)
    for stack in stacks:
        if name == stack.name:
            return stack.path
    if stacks:
        raise ValueError(
            f"stack: expected one of {_described(stacks)} of {type(model).__name__}, or the name of a module list, got "
            f"{name!r}"
        )
    if "." in name:
        raise ValueError(f"layers_path: expected the name of a module list, got {name!r}; {_describe(lists)}")
    raise ValueError(
        f"stack: expected none for {type(model).__name__}, which has one stack or stacks without names, or the name "
        f"of a module list, got {name!r}; {_describe(lists)}"
    )


def _default_path(model: Any, lists: dict[str, nn.ModuleList]) -> str:
    stacks = named_stacks(model)
    if stacks and are_alternatives(model):
        raise ValueError(
            f"stack: expected the name of one of the stacks of {type(model).__name__}, {_described(stacks)}, got none"
        )
    paths = {stack.name: stack.path for stack in stacks}
    if DECODER in paths:
        return paths[DECODER]
    depth = getattr(text_config(model), "num_hidden_layers", None)
    found = [name for name, m in lists.items() if len(m) == depth and not inside_another(name, lists)]
    if len(found) > 1 and hasattr(model, "get_decoder"):
        inside = {id(m) for m in model.get_decoder().modules()}
        found = [name for name in found if id(lists[name]) in inside]
    if len(found) != 1 and TEXT in paths and model.can_generate():
        return paths[TEXT]
    if not found and depth is not None:
        found = _only_list(model, lists)
    if len(found) != 1:
        raise ValueError(f"model: {_not_one(model, lists, stacks, depth, len(found))}")
    return found[0]


def _only_list(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """The one list that is in no other, if its layers run several times (ALBERT): it has most of the weights beside
    embeddings, and neither stages nor parts that are numbered like layers (LongCat-Flash)."""
    outer = [name for name in lists if not inside_another(name, lists)]
    if len(outer) != 1 or _stages(model, lists):
        return []
    layers = lists[outer[0]]
    numbers = (vars(module).get(name) for module in layers.modules() for name in LAYER_INDEX_ATTRIBUTES)
    embeddings = sum(_count(m) for m in model.modules() if isinstance(m, nn.Embedding))
    most = 2 * _count(layers) > _count(model) - embeddings
    return outer if most and all(number is None or number < len(layers) for number in numbers) else []


def _not_one(model: Any, lists: dict[str, nn.ModuleList], stacks: list[NamedStack], depth: Any, found: int) -> str:
    """Why a model has no default stack, and the way out."""
    name = type(model).__name__
    writes = callable(getattr(model, "can_generate", None)) and model.can_generate()
    stages = {} if stacks or writes else _stages(model, lists)
    if stages:
        return _no_stack(model, stages, lists)
    told = f"its stacks are {_described(stacks)}" if stacks else _describe(lists)
    way = "pass the name of the right one as layers_path=" if lists else "its layers cannot be found"
    if depth is None:
        return f"expected a config that counts the layers (num_hidden_layers) of {name}, got one without; {told}; {way}"
    got = f"{found} lists of that length" if found else "none"
    return f"expected one module list of {depth} layers (num_hidden_layers) in {name}, got {got}; {told}; {way}"


def _no_stack(model: Any, stages: Mapping[str, Any], lists: dict[str, nn.ModuleList], outer: str = "") -> str:
    """That a model has stages in place of a stack, and the way out."""
    way = (
        "pass the name of one as layers_path=, to measure, prune, quantize, factorize, narrow or skip its layers; "
        "drop requires a config that counts them"
    )
    if any(stage not in lists for stage in stages):
        way = "they are no module lists, and cannot be treated layer by layer"
    more = f"; prune and quantize also take all of them as layers, by layers_path={outer!r}" if outer else ""
    found = f"{len(stages)} stages: {_rows(stages)}"
    return f"expected one stack of layers in {type(model).__name__}, got {found}; {way}{more}"


def _stages(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The layers of each stage of a model that has several, which are listed inside of another list: not the experts or
    heads of each layer, since those have no norms or are the smaller part of it. Empty for other models.
    """
    inside = {name: m for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    whole = 0
    for path, outer in ((path, outer) for path, outer in lists.items() if not inside_another(path, lists)):
        whole += _count(outer)
        for index, element in enumerate(outer):
            place = f"{path}.{index}"
            inner = (name for name in inside if name == place or name.startswith(f"{place}."))
            own = next((n for n in inner if _is_normed(inside[n]) and 2 * _count(inside[n]) > _count(element)), None)
            if own is not None:
                found[own] = inside[own]
    return found if len(found) > 1 and 2 * sum(map(_count, found.values())) > whole else {}


def _is_normed(layers: nn.ModuleList | nn.Sequential) -> bool:
    """Whether each of these has a norm of any kind."""
    return all(any("Norm" in type(module).__name__ for module in layer.modules()) for layer in layers)


def _norm_widths(layers: nn.Module) -> set[int]:
    """The widths of all norms. Those of stages have none in common, those of the parts of a layer the layer's own."""
    norms = (module for module in layers.modules() if "Norm" in type(module).__name__)
    return {len(p) for norm in norms for p in norm.parameters(recurse=False) if p.dim() == 1 and len(p)}


def _count(module: nn.Module) -> int:
    """Number of entries of all parameters."""
    return sum(p.numel() for p in module.parameters())


def are_alternatives(model: Any) -> bool:
    """Whether a model is two towers beside each other, such as CLIP, neither of which is the main one."""
    return has_two_towers(model) and not model.can_generate()


def has_two_towers(model: Any) -> bool:
    """Whether a model reads text and images by towers beside each other, such as CLIP or GIT."""
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features")


def _described(stacks: list[NamedStack]) -> str:
    return ", ".join(f"{stack.name!r} ({stack.path}, {stack.depth} layers)" for stack in stacks)


def _describe(lists: dict[str, nn.ModuleList]) -> str:
    if not lists:
        return "the model has no module lists"
    return "module lists: " + _rows({name: m for name, m in lists.items() if not inside_another(name, lists)})


def _rows(lists: Mapping[str, nn.ModuleList | nn.Sequential]) -> str:
    return ", ".join(f"{name} ({len(layers)} x {type(layers[0]).__name__})" for name, layers in lists.items())


def _sides(model: Any) -> dict[str, nn.Module]:
    """The two sides of an encoder-decoder; empty for other models, also for one side alone."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    try:
        sides = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
    except (AttributeError, NotImplementedError):  # raised by transformers for architectures without them
        return {}
    encoder, decoder = sides.values()
    apart = all(one is not other for one in encoder.modules() for other in (decoder, model))
    return sides if apart and all(inner is not encoder for inner in decoder.modules()) else {}


def _tower_of(whole: Any, config: Any) -> str | None:
    """The name of a tower by its config in the model's config."""
    if config is whole:
        return TEXT
    inner = [*_inner_configs(whole)]
    same = [field for field, found in inner if found is config]
    alike = [field for field, found in inner if found.model_type == config.model_type]
    return next((field.removesuffix("_config") for field in [*same, *alike]), None)


def _inner_configs(config: Any) -> Iterator[tuple[str, Any]]:
    for field, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and not field.startswith("_"):
            yield field, inner
            yield from _inner_configs(inner)
