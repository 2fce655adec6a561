"""Conversion of checkpoints: to stock transformers, from it to models that start with the same function, and from the
papers' released code. `folding.py` has the mathematics.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .authors import AUTHORS_NORM_TYPES
from .checkpoint import check_new, is_reading_error, save_aside
from .configuration_cod import NormPlacementConfig
from .configuration_cod_llama import CodLlamaConfig
from .families import FAMILIES, Family
from .folding import check_foldable, neutral_modifiers, norm_scales, output_scales, scale_norms, scale_outputs
from .modeling_cod_llama import CodLlamaForCausalLM
from .modifiers import MODIFIERS
from .placements import LNS_EXPONENT, SCALED

Source = PreTrainedModel | str | Path

# What transformers raises while it builds a config or a model from values of another type or range.
_OF_BUILDING = (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)


def fold_lns(source: Source, output: str | Path | None = None) -> PreTrainedModel:
    """Turn a model of this package into a stock model with the same function, for tools that know stock models only.

    The weights of the norms of layer l are multiplied by the factor of LNS, 1 / sqrt(l); if norms have no weights
    (OLMo), those of the Linears after them are. The factors of `lns_output` and of LayerScale are multiplied into the
    last Linears of the sublayers. Models with `pre` or `scaled_init`, and OLMo 2 with `reordered`, compute the stock
    function already; only their class changes. In bfloat16 the logits differ by the rounding of the weights. The new
    model is on the CPU.

    Args:
        source: A model of this package, or the directory or Hub id of one; a model is left unchanged.
        output: Also write the stock model to this new directory; if `source` is a directory or Hub id, with its
            tokenizer.

    Raises:
        ValueError: If there is no such source, the placement has no stock equivalent, a gate of GPAS is not 0, a layer
            is not of this package, transformers lacks the head, the weights are quantized, offloaded or have adapters,
            or `output` exists.
    """
    check_new(output)
    model, family = _load(source, "ours")
    check_foldable(model, family)
    stock_class = family.stock_class(type(model).__name__)
    if stock_class is None:
        raise ValueError(f"source: expected a head that transformers has, got {type(model).__name__}")
    scales, outputs = norm_scales(model), output_scales(model)
    stock = _rebuild(model, stock_class, family.stock_config(**_stock_fields(model.config)))
    scale_norms(stock, family, scales)
    scale_outputs(stock, outputs)
    return _finish(stock, source, output)


def to_lns(
    source: Source, output: str | Path | None = None, *, exponent: float = LNS_EXPONENT, placement: str = "lns"
) -> PreTrainedModel:
    """Turn a stock model into an LNS model with the same function, to continue its training with LNS.

    The weights of the norms of layer l are multiplied by l^exponent, which cancels the factor of LNS. With exponent 0
    nothing is scaled, and `LnsAnnealing` raises it during training, which changes the function step by step. In
    bfloat16 the logits differ by the rounding of the weights. The new model is on the CPU.

    Args:
        source: A model of a base family of this package, or the directory or Hub id of one; a model is left unchanged.
        output: Also write the LNS model to this new directory; if `source` is a directory or Hub id, with its
            tokenizer.
        exponent: `lns_exponent` of the new model, from 0 to 1.
        placement: `lns`, or `lns_output`, whose factors are cancelled in the last Linears of the sublayers.

    Raises:
        ValueError: If there is no such source, the family is unknown or does not support `lns`, the head is unknown,
            the weights are quantized, offloaded or have adapters, or `output` exists.
    """
    if placement not in SCALED:
        raise ValueError(f"placement: expected one of {', '.join(SCALED)}, got {placement!r}")
    return _started(source, output, norm_placement=placement, lns_exponent=exponent)


def to_gpas(source: Source, output: str | Path | None = None) -> PreTrainedModel:
    """Turn a stock model into one with GPAS (`ActivationScaling`) and the same function: all gates are 0.

    Args and errors as `to_lns`.
    """
    return _started(source, output, gpas=True)


def to_layer_scale(source: Source, output: str | Path | None = None) -> PreTrainedModel:
    """Turn a stock model into one with `LayerScale` and the same function: all factors are 1.

    Args and errors as `to_lns`; the norms of OLMo 2 would cancel the factors, so its models are refused.
    """
    return _started(source, output, layer_scale=1.0)


def _started(source: Source, output: str | Path | None, **fields: Any) -> PreTrainedModel:
    """A model of this package with these fields of the config, which computes what the stock model does."""
    check_new(output)
    model, family = _load(source, "stock")
    our_class = family.our_class(type(model).__name__)
    if our_class is None:
        raise ValueError(f"source: expected a head that {family.model_type} has, got {type(model).__name__}")
    config = family.config(**{"norm_placement": family.config.stock_placement, **_stock_fields(model.config), **fields})
    started = _rebuild(model, our_class, config)
    scale_norms(started, family, [1 / scale for scale in norm_scales(started)])
    scale_outputs(started, [(1 / attention, 1 / mlp) for attention, mlp in output_scales(started)])
    return _finish(started, source, output)


def from_authors(
    source: str | Path | Mapping[str, torch.Tensor],
    norm_type: str,
    config: Mapping[str, Any] | None = None,
    post_layers: int | None = None,
    output: str | Path | None = None,
) -> CodLlamaForCausalLM:
    """Load a checkpoint of the code released with Mix-LN or the Curse of Depth as a model of this package.

    The checkpoint does not contain its NORM_TYPE. pre, scale_pre and lns have the same weights, and so have post and
    deeppost: a wrong one among them loads without an error and computes another function.

    Args:
        source: Directory or Hub id of the checkpoint, or its state dict.
        norm_type: The NORM_TYPE that it was trained with, upper or lower case: a name from `AUTHORS_NORM_TYPES`.
        config: Contents of its config.json; required with a state dict.
        post_layers: The POST_NUM that it was trained with; required for post_pre and scale_post_pre, else None.
        output: Also write the model to this new directory; if `source` is a directory or Hub id, with its tokenizer.

    Raises:
        ValueError: For an unknown NORM_TYPE, a missing source, `config` or `post_layers`, a `post_layers` that the
            NORM_TYPE does not use, weights that do not fit, or an `output` that exists.
    """
    check_new(output)
    if not isinstance(norm_type, str) or norm_type.lower() not in AUTHORS_NORM_TYPES:
        raise ValueError(f"norm_type: expected one of {', '.join(AUTHORS_NORM_TYPES)}, got {norm_type!r}")
    if not isinstance(config, Mapping | None):
        raise ValueError(f"config: expected a dict or None, got {config!r}")
    if config is None:
        if isinstance(source, Mapping):
            raise ValueError("config: expected the contents of config.json with a state dict, got None")
        with _found(source):
            config = _config_dict(source)
    with _found("config" if isinstance(source, Mapping) else source):
        fields = _authors_fields(dict(config), AUTHORS_NORM_TYPES[norm_type.lower()], post_layers)
        model_config = CodLlamaConfig(**fields)
    if isinstance(source, Mapping):
        state = {name.removeprefix("module."): weight.clone() for name, weight in source.items()}
        model = _load_exactly(CodLlamaForCausalLM, None, config=model_config, state_dict=state)
    else:
        with _found(source):
            model = _load_exactly(CodLlamaForCausalLM, source, config=model_config, key_mapping={r"^module\.": ""})
    # From a directory, transformers reads it from config.json, including the invalid -1.
    model.generation_config.pad_token_id = model_config.pad_token_id
    return _finish(model, source, output)


def _authors_fields(config: dict[str, Any], placement: dict[str, Any], post_layers: int | None) -> dict[str, Any]:
    """Fields of CodLlamaConfig from the authors' config.json; translates `max_sequence_length` and the pad token -1."""
    fields = {**config, **placement}
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    if "max_sequence_length" in fields:
        fields["max_position_embeddings"] = fields.pop("max_sequence_length")
    if (fields.get("pad_token_id") or 0) < 0:
        fields["pad_token_id"] = None
    if placement["norm_placement"] == "mix":
        n_layers = fields["num_hidden_layers"]
        if post_layers is None or not 0 <= post_layers <= n_layers:
            raise ValueError(f"post_layers: expected a number from 0 to {n_layers}, got {post_layers}")
        fields["post_ln_fraction"] = post_layers / n_layers
    elif post_layers is not None:
        raise ValueError(
            f"post_layers: expected None unless norm_type is post_pre or scale_post_pre, got {post_layers}"
        )
    return fields


def _load(source: Source, whose: str) -> tuple[PreTrainedModel, Family]:
    """The model, loaded unless `source` is one, and its family; `whose` is "ours" or "stock"."""
    source = getattr(source, "_orig_mod", source)  # the model inside torch.compile's wrapper
    if isinstance(source, nn.Module):
        config = _check_model(source).config
    else:
        with _found(source):
            _config_dict(source)
            config = AutoConfig.from_pretrained(source)
    families = {(f.config if whose == "ours" else f.stock_config).model_type: f for f in FAMILIES}
    if config.model_type not in families:
        raise ValueError(f"source: expected a model of type {', '.join(families)}, got {config.model_type!r}")
    family = families[config.model_type]
    if isinstance(source, PreTrainedModel):
        return source, family
    name = (config.architectures or ["none"])[0]
    models = {model.__name__: model for model in family.models.values()}
    model_class = models.get(name) if whose == "ours" else family.stock_class(name)
    if model_class is None:
        raise ValueError(f"source: expected architectures that transformers or hf_cod has, got {name}")
    with _found(source):
        return _load_exactly(model_class, source), family


def _check_model(model: nn.Module) -> PreTrainedModel:
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise ValueError(
            f"source: expected a model without adapters, got {type(model).__name__} with PEFT adapters; "
            "call merge_and_unload first"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"source: expected a model of transformers, got {type(model).__name__}")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("source: expected all weights in memory, got some that are offloaded or on the meta device")
    return model


@contextmanager
def _found(source: Any) -> Iterator[None]:
    """Turn the errors of transformers for a missing, unreachable or damaged checkpoint or config into ValueError."""
    try:
        yield
    except _OF_BUILDING as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"source: expected a config from which transformers can build the model, got {type(error).__name__} in "
            f"{str(source)!r}: {cause}"
        ) from error
    except Exception as error:
        if not is_reading_error(error):
            raise
        raise ValueError(
            f"source: expected a directory with a checkpoint or a Hub id, got {str(source)!r}: {error}"
        ) from error


def _config_dict(source: str | Path) -> dict[str, Any]:
    """The contents of config.json; raises if there is none, which transformers does not."""
    config = PreTrainedConfig.get_config_dict(source)[0]
    if not config:
        raise FileNotFoundError(f"{source} has no config.json")
    return config


def _stock_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields of the config, except those of this package and those that name its class."""
    ours = {field.name for field in dataclasses.fields(NormPlacementConfig)}
    names = ours | {"model_type", "architectures", "auto_map", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in names}


def _rebuild(model: PreTrainedModel, model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of another class with copies of the same weights, each in its own dtype."""
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise ValueError("source: expected weights in floating point, got a quantized model")
    old, new = f"{model.base_model_prefix}.", f"{model_class.base_model_prefix}."
    state = {
        new + name.removeprefix(old) if name.startswith(old) else name: weight.detach().to("cpu", copy=True)
        for name, weight in model.state_dict().items()
        if not any(f".{part}." in name for part in MODIFIERS)
    }
    state |= {new + name: weight.to(model.dtype) for name, weight in neutral_modifiers(config).items()}
    # Loading casts all weights to one dtype: the widest, so that casting back to each weight's own dtype is exact.
    widest = functools.reduce(torch.promote_types, (weight.dtype for weight in state.values()), model.dtype)
    rebuilt = _load_exactly(model_class, None, config=config, state_dict=state, dtype=widest)
    for name, parameter in rebuilt.named_parameters():
        parameter.data = parameter.data.to(state[name].dtype)
    rebuilt.config.dtype = model.dtype
    if rebuilt.can_generate():
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    return rebuilt


def _load_exactly(model_class: Any, source: Any, **kwargs: Any) -> Any:
    """`from_pretrained`, but raises unless names and shapes of all weights match."""
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that mismatched sizes are listed, too
    model, info = model_class.from_pretrained(source, **told, **kwargs)
    # Buffers that old versions of transformers saved, and that are computed now, are ignored.
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")}
    wrong = sorted(info["missing_keys"]) + sorted(unexpected) + sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise ValueError(
            f"source: expected exactly the weights of the model, got missing, unknown or mismatched {wrong}"
        )
    return model


def _finish(model: Any, source: Any, output: str | Path | None) -> Any:
    if output is not None:
        save_aside(model, Path(output), Path(source) if isinstance(source, str | Path) else None)
    return model
