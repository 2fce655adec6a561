"""The fields that every configuration of this package adds to the configuration of its base family."""

import inspect
import math
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from .placements import LAYER_SCALED, LNS_EXPONENT, PLACEMENTS, SCALED

# Increased whenever the mathematics or the file format of the model code changes. Every config stores the version that
# its model requires, because an installed package silently takes precedence over the code in a model repository.
CODE_VERSION = 2
# Versions whose models this code computes alike. 2 added `gpas`, `layer_scale`, `lns_exponent` and `lns_output`.
READABLE_VERSIONS = (1, 2)

# True while a saved config is read, when advice on training is too late.
_READING: ContextVar[bool] = ContextVar("_READING", default=False)

TEXT_HEADS = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}


@dataclass(kw_only=True)
class NormPlacementConfig:
    """Mixin for configurations: place it before the configuration class of the base family.

    Args:
        norm_placement: The norm placement; a name from the table `PLACEMENTS` in `placements.py`.
        post_ln_fraction: alpha of Mix-LN, the share of layers (from the first) with Post-LN.
        scaled_residual_init: Initialise the output projections with std / sqrt(2 N), as `scaled_init` does, in another
            placement. An error with `deepnorm`, which has its own initialisation; a warning with `lns`.
        deepnorm_alpha: Residual gain of DeepNorm; None: (2 N)^(1/4).
        deepnorm_beta: Gain of DeepNorm's initialisation; None: (8 N)^(-1/4).
        lns_exponent: Exponent of the layer's number l in the factor of `lns` and `lns_output`; an error with other
            placements. `hf_cod.LnsAnnealing` raises it from 0 during training.
        gpas: Scale the residual stream of each layer by a learned gate, see `ActivationScaling`.
        layer_scale: Initial value of LayerScale on both sublayers, see `LayerScale`; None: no LayerScale. With `pre`,
            `scaled_init`, `lns` and `lns_output` only.
        layer_depths: The original index (from 0) of each layer, if layers were removed or repeated after training.
            Set by `save_pretrained`.
        original_num_hidden_layers: The original number of layers, with `layer_depths`. Set by `save_pretrained`.
        module_shapes: Modules with shapes of their own, as `shapes.py` describes them.
        cod_code_version: Version of the model code that the model requires.

    Raises:
        ValueError: For an unknown placement, one that the family does not support, a number out of range or a value of
            another type.
    """

    # The placement of the base family's own checkpoints.
    stock_placement: ClassVar[str] = "pre"

    # `Any`, because the type check of transformers would run first, and its error is no ValueError that names the valid
    # values; `check_placement` checks types, too.
    norm_placement: Any = "lns"
    post_ln_fraction: Any = 0.25
    scaled_residual_init: Any = False
    deepnorm_alpha: Any = None
    deepnorm_beta: Any = None
    lns_exponent: Any = LNS_EXPONENT
    gpas: Any = False
    layer_scale: Any = None
    layer_depths: Any = None
    original_num_hidden_layers: Any = None
    module_shapes: Any = None
    cod_code_version: Any = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields of this mixin after those of the base family are set."""
        _register_models(type(self).__name__)
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the base family's configuration follows in the MRO
        check_placement(self)
        warn_about_placement(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config with these contents, as transformers calls it for a config.json.

        Raises:
            ValueError: For a checkpoint of another model type without `norm_placement`, whose function the default
                would change silently.
        """
        model_type = config_dict.get("model_type", cls.model_type)  # type: ignore[attr-defined]
        silent = "norm_placement" not in {**config_dict, **kwargs}
        default = cls.__dataclass_fields__["norm_placement"].default
        if model_type != cls.model_type and silent and default != cls.stock_placement:  # type: ignore[attr-defined]
            raise ValueError(
                f"norm_placement: expected one of {', '.join(cls.valid_placements())} in the config, got none for "
                f"model_type {model_type!r}; for a stock checkpoint use hf_cod.to_lns, or pass "
                f"norm_placement={cls.stock_placement!r}"
            )
        token = _READING.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # as above
        finally:
            _READING.reset(token)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config.json as transformers does, and the files required to build models without this package.

        These are the files of the model code (copied by transformers) and an `auto_map` for every head. Saving a model
        calls this method, too.
        """
        self.auto_map = self.remote_code_map()
        self.cod_code_version = required_version(self)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]  # as above

    @classmethod
    def remote_code_map(cls) -> dict[str, str]:
        """The `auto_map` of a saved model: every Auto class and the file and class that it loads."""
        config_file = cls.__module__.rsplit(".", 1)[-1]
        modeling_file = config_file.replace("configuration_", "modeling_")
        name = cls.__name__.removesuffix("Config")
        models = {auto: f"{modeling_file}.{name}{suffix}" for auto, suffix in cls.auto_heads().items()}
        return {"AutoConfig": f"{config_file}.{cls.__name__}", **models}

    @classmethod
    def valid_placements(cls) -> tuple[str, ...]:
        """The placements that the family supports."""
        return tuple(PLACEMENTS)

    @classmethod
    def auto_heads(cls) -> dict[str, str]:
        """Auto class -> suffix of the model class's name."""
        return TEXT_HEADS


@cache
def _register_models(config: str) -> None:
    """Register the models of a configuration with the Auto classes, before its first instance.

    Not earlier, because importing the models takes seconds. In a model repository `auto_map` names them instead.
    """
    if __package__ == "hf_cod.models":
        import_module(f"{__package__}.families").register(config)


def check_placement(config: Any) -> None:
    """Raise ValueError if a field of `NormPlacementConfig` is out of range.

    Called again when a model is built, because fields of a config may be set after its construction.

    Raises:
        ValueError: "field: expected ..., got ...".
    """
    valid = config.valid_placements()
    if config.norm_placement not in valid:
        known = config.norm_placement in tuple(PLACEMENTS)
        why = f", which {type(config).__name__} does not support" if known else ""
        raise ValueError(f"norm_placement: expected one of {', '.join(valid)}, got {config.norm_placement!r}{why}")
    if not (_is_number(config.post_ln_fraction) and 0.0 <= config.post_ln_fraction <= 1.0):
        raise ValueError(f"post_ln_fraction: expected a number from 0 to 1, got {config.post_ln_fraction!r}")
    for field in ("deepnorm_alpha", "deepnorm_beta"):
        gain = getattr(config, field)
        if gain is not None and not (_is_number(gain) and gain > 0.0):
            raise ValueError(f"{field}: expected a number above 0, or None for the paper's formula, got {gain!r}")
    for field in ("scaled_residual_init", "gpas"):
        if not isinstance(getattr(config, field), bool):
            raise ValueError(f"{field}: expected True or False, got {getattr(config, field)!r}")
    if config.scaled_residual_init and config.norm_placement == "deepnorm":
        raise ValueError("scaled_residual_init: expected False with norm_placement='deepnorm', got True")
    if not _is_integer(config.cod_code_version):
        raise ValueError(f"cod_code_version: expected a whole number, got {config.cod_code_version!r}")
    _check_scales(config)
    _check_heads(config)
    _check_depths(config)


def required_version(config: Any) -> int:
    """The first version of the model code that computes this config's model."""
    newer = config.gpas or config.layer_scale is not None or config.lns_exponent != LNS_EXPONENT
    return 2 if newer or config.norm_placement == "lns_output" else 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _check_scales(config: Any) -> None:
    exponent, initial, placement = config.lns_exponent, config.layer_scale, config.norm_placement
    if not (_is_number(exponent) and 0.0 <= exponent <= 1.0):
        raise ValueError(f"lns_exponent: expected a number from 0 to 1, got {exponent!r}")
    if exponent != LNS_EXPONENT and placement not in SCALED:
        raise ValueError(f"lns_exponent: expected {LNS_EXPONENT} with norm_placement={placement!r}, got {exponent}")
    if initial is not None and not (_is_number(initial) and math.isfinite(initial)):
        raise ValueError(f"layer_scale: expected a finite number or None, got {initial!r}")
    if initial is not None and placement not in LAYER_SCALED:
        raise ValueError(f"layer_scale: expected None with norm_placement={placement!r}, got {initial}")


def _check_heads(config: Any) -> None:
    # The default of Qwen2 and Qwen3 is 32, whatever num_attention_heads is; without this check their attention fails.
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups is not None and (groups < 1 or heads % groups):
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads, {heads}, got {groups}")


def _check_depths(config: Any) -> None:
    depths, n_layers = config.layer_depths, config.original_num_hidden_layers
    if n_layers is not None and not (_is_integer(n_layers) and n_layers > 0):
        raise ValueError(f"original_num_hidden_layers: expected a whole number above 0 or None, got {n_layers!r}")
    if depths is not None and not (isinstance(depths, list | tuple) and all(map(_is_integer, depths))):
        raise ValueError(f"layer_depths: expected a list of whole numbers or None, got {depths!r}")
    if depths is None:
        if n_layers is not None:
            raise ValueError(f"original_num_hidden_layers: expected None without layer_depths, got {n_layers}")
        return
    if len(depths) < config.num_hidden_layers:
        raise ValueError(
            f"layer_depths: expected one entry for each of the {config.num_hidden_layers} layers, got {len(depths)}"
        )
    if n_layers is None or not all(0 <= depth < n_layers for depth in depths):
        raise ValueError(
            f"layer_depths: expected numbers from 0 to original_num_hidden_layers - 1, got {depths} "
            f"and original_num_hidden_layers={n_layers}"
        )


def warn_about_placement(config: Any) -> None:
    """Warn about settings that are valid but rarely intended."""
    if config.norm_placement == "lns" and config.scaled_residual_init and not _READING.get():
        _warn("scaled_residual_init weakens LayerNorm Scaling; its authors recommend the plain normal initialisation")
    if config.cod_code_version not in READABLE_VERSIONS:
        newer = config.cod_code_version > CODE_VERSION
        mend = "upgrade with  pip install -U hf_cod" if newer else "install the earlier version of hf_cod"
        _warn(
            f"this model was saved by version {config.cod_code_version} of the model code, and the installed version "
            f"{CODE_VERSION} may compute another function: {mend}, or load it with trust_remote_code=True in a process "
            "that does not import hf_cod, which then uses the code next to the weights"
        )


def _warn(message: str) -> None:
    """Warn at the user's line: the first one outside this package and the libraries that build configs."""
    inner = {__name__.split(".")[0], "transformers", "huggingface_hub"}
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level - 1 if frame is None else level)
