"""The fields that every configuration of this package adds to the configuration of its base family."""

import warnings
from dataclasses import dataclass
from typing import Any

from .placements import PLACEMENTS

# Raised whenever the mathematics or the file format of the model code changes. It is stored in every config, because
# an installed package wins over the code in a model repository without a word.
CODE_VERSION = 1

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
        norm_placement: Where the norms stand; a name from the table `PLACEMENTS` in `placements.py`.
        post_ln_fraction: alpha of Mix-LN, the share of layers (from the first) with Post-LN.
        scaled_residual_init: Draw the output projections with std / sqrt(2 N), as `scaled_init` does, under another
            placement. Not with `deepnorm`, which brings its own initialisation; a warning with `lns`.
        deepnorm_alpha: Residual gain of DeepNorm instead of (2 N)^(1/4).
        deepnorm_beta: Gain of DeepNorm's initialisation instead of (8 N)^(-1/4).
        layer_depths: Where layers were removed or repeated after training: the place (from 0) that each layer had.
            Written by `save_pretrained`; no need to set it.
        original_num_hidden_layers: The number of layers that `layer_depths` counts in.
        cod_code_version: Version of the model code that wrote the config.

    Raises:
        ValueError: For an unknown placement, one that the family cannot have, or a number out of its range.
    """

    norm_placement: str = "lns"
    post_ln_fraction: float | int = 0.25
    scaled_residual_init: bool = False
    deepnorm_alpha: float | int | None = None
    deepnorm_beta: float | int | None = None
    layer_depths: list[int] | None = None
    original_num_hidden_layers: int | None = None
    cod_code_version: int = CODE_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields of this mixin after those of the base family are set."""
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the base family's configuration follows in the MRO
        check_placement(self)
        warn_about_placement(self)

    @classmethod
    def remote_code_map(cls) -> dict[str, str]:
        """The `auto_map` of a saved model: every Auto class and the file and class that serves it."""
        config_file = cls.__module__.rsplit(".", 1)[-1]
        modeling_file = config_file.replace("configuration_", "modeling_")
        name = cls.__name__.removesuffix("Config")
        models = {auto: f"{modeling_file}.{name}{suffix}" for auto, suffix in cls.auto_heads().items()}
        return {"AutoConfig": f"{config_file}.{cls.__name__}", **models}

    @classmethod
    def valid_placements(cls) -> tuple[str, ...]:
        """The placements that the family can have."""
        return tuple(PLACEMENTS)

    @classmethod
    def auto_heads(cls) -> dict[str, str]:
        """Auto class -> ending of the model class's name."""
        return TEXT_HEADS


def check_placement(config: Any) -> None:
    """Raise ValueError if a field of `NormPlacementConfig` is out of its range.

    Called again when a model is built, because fields of a config may be set after it was made.

    Raises:
        ValueError: "field: expected ..., got ...".
    """
    valid = config.valid_placements()
    if config.norm_placement not in valid:
        known = config.norm_placement in PLACEMENTS
        why = f", which {type(config).__name__} cannot have" if known else ""
        raise ValueError(f"norm_placement: expected one of {', '.join(valid)}; got {config.norm_placement!r}{why}")
    if not 0.0 <= config.post_ln_fraction <= 1.0:
        raise ValueError(f"post_ln_fraction: expected a number from 0 to 1, got {config.post_ln_fraction}")
    for field in ("deepnorm_alpha", "deepnorm_beta"):
        gain = getattr(config, field)
        if gain is not None and not gain > 0.0:
            raise ValueError(f"{field}: expected a number above 0 or None for the paper's formula, got {gain}")
    if config.scaled_residual_init and config.norm_placement == "deepnorm":
        raise ValueError("scaled_residual_init: expected False with norm_placement='deepnorm', got True")
    _check_depths(config)


def _check_depths(config: Any) -> None:
    depths, n_layers = config.layer_depths, config.original_num_hidden_layers
    if depths is None:
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
    """Warn of settings that are valid but rarely wanted."""
    if config.norm_placement == "lns" and config.scaled_residual_init:
        warnings.warn(
            "scaled_residual_init weakens LayerNorm Scaling; its authors recommend the plain normal initialisation",
            UserWarning,
            stacklevel=2,
        )
    if config.cod_code_version > CODE_VERSION:
        warnings.warn(
            f"this model was saved by version {config.cod_code_version} of the model code, and version {CODE_VERSION} "
            "is loading it: upgrade with  pip install -U hf_cod",
            UserWarning,
            stacklevel=2,
        )
