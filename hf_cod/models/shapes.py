"""Modules with shapes that a config's sizes do not describe: low rank, fewer heads, narrower MLPs, by layer.

A config records them in one field, `module_shapes`, and the model's constructor builds them. Name of a module (relative
to the base model, so that it is valid with every head) -> its differences from the sizes in the config:

    {"layers.3.mlp.up_proj": {"rank": 64},                      # W = expand reduce
     "layers.3.mlp.gate_proj": {"rank": 64, "sparse": 1},       # W = expand reduce + sparse
     "layers.3.self_attn.q_proj": {"out_features": 256},        # fewer heads ...
     "layers.3.self_attn": {"num_key_value_groups": 1},         # ... and a number that the attention computes with
     "layers.3.self_attn": {"config.num_attention_heads": 4},   # ... or that it reads from the config each time
     "layers.3.self_attn.q_norm": {"weight": 256},              # ... or a vector with a number for each of their rows
     "layers.3.mlp.experts": {"down_proj.2": 96},               # fewer channels of each expert: a dimension's size
     "layers.3.mlp.experts": {"down_proj.rank": 16,             # ... or factors of each expert's matrix, see
                              "down_proj.experts": 8},          # `recorded_experts` in `factors.py`
     "layers.3.mlp.down_proj": {"in_features": 96, "bias": 1}}  # a bias where the family has none

Modules are built in the constructor and not by a quantizer of transformers, which could replace modules, too, because
(1) a model has one quantizer, which quantization or sparse storage of such a model requires; (2) Trainer and PEFT treat
a model with a quantizer as quantized and do not train it; (3) a model repository cannot contain a quantizer as remote
code. The stock model type is not used, because without this code a stock class would ignore the factors and continue
with random weights.
"""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .factors import EXPERT_KEYS, LowRankExperts, LowRankLinear, build_expert_factors, recorded_experts

# Attributes in which modules keep the index of their layer. It never changes without the layer's place.
LAYER_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number", "layer_num")
SIZES = ("in_features", "out_features", "rank")
# Value 1: the module has the part.
BIAS, SPARSE = FLAGS = ("bias", "sparse")


class FamilyCode:
    """Mixin before a class of transformers: what transformers asks of its code is answered by that class."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, because the weights are initialised by the family's own code. For other code, transformers does not
        initialise modules without parameters, through which Falcon-H1 sets buffers of its layers.
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the family: transformers reads the answer off the source of a class, and would read it off this file."""
        return _family_of(cls)._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """See `_can_set_experts_implementation`."""
        return _family_of(cls)._can_set_attn_implementation()


def _family_of(cls: Any) -> Any:
    """The class of transformers behind the mixin."""
    return cls.__mro__[cls.__mro__.index(FamilyCode) + 1]


class ShapedModel(FamilyCode):
    """Mixin for model classes, before a class of transformers: builds the modules in the config's `module_shapes`."""

    config: Any
    base_model: Any

    def post_init(self) -> None:
        """Builds the modules; called at the end of every constructor, before weights are initialised or loaded."""
        build_shapes(self.base_model, self.config.module_shapes)
        super().post_init()  # type: ignore[misc]  # a class of transformers follows in the MRO

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, after a check that the config records the model's ranks.

        Raises:
            ValueError: the config does not record them, so the saved model could not be loaded.
        """
        check_recorded(self.base_model, self.config.module_shapes)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # as above


def build_shapes(base: nn.Module, shapes: Any) -> None:
    """Builds modules of a base model in the recorded shapes; modules with that shape already are left unchanged.

    Raises:
        ValueError: "module_shapes: expected ..., got ..."; names the module.
    """
    if shapes is not None and not isinstance(shapes, dict):
        raise ValueError(f"module_shapes: expected sizes by name of module, got {shapes!r:.60}")
    for name, changes in (shapes or {}).items():
        if not isinstance(name, str) or not isinstance(changes, dict) or not changes:
            raise ValueError(f"module_shapes: expected sizes of {name!s:.60}, got {changes!r:.60}")
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"module_shapes: expected modules of {type(base).__name__}, got {name!r}") from None
        wrong = [key for key, value in changes.items() if type(value) is not int or value < 1]
        if wrong:
            raise ValueError(
                f"module_shapes: expected whole numbers above 0, got {wrong[0]} = {changes[wrong[0]]!r} of {name}"
            )
        # Conv1D stores the same matrix as (in, out); handled here, too, because this file is saved without the package.
        if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, _reshaped(module, changes, name))
        else:
            _set_numbers(module, changes, name)


def recorded_sizes(module: nn.Module) -> dict[str, int]:
    """in_features, out_features, the rank of a LowRankLinear, and 1 for a sparse part and for a bias."""
    if isinstance(module, LowRankLinear):
        sizes = dict(zip(SIZES, (module.reduce.in_features, module.expand.out_features, module.rank), strict=True))
        sizes |= {} if module.sparse is None else {SPARSE: 1}
    elif isinstance(module, Conv1D):
        sizes = {"in_features": module.nx, "out_features": module.nf}
    else:
        assert isinstance(module, nn.Linear)
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
    return sizes if module.bias is None else {**sizes, BIAS: 1}


def check_recorded(base: nn.Module, shapes: Any) -> None:
    """Checks that `shapes` records each LowRankLinear of a base model with its rank and its sparse part, and each
    LowRankExperts.

    Raises:
        ValueError: a module is recorded wrongly or not at all.
    """
    for name, module in base.named_modules():
        place, expected = name, {}
        if isinstance(module, LowRankLinear):
            expected = {"rank": module.rank, SPARSE: None if module.sparse is None else 1}
        elif isinstance(module, LowRankExperts):
            place, _, key = name.rpartition(".")
            own = recorded_experts(module, key)
            expected = {f"{key}.{kind}": own.get(f"{key}.{kind}") for kind in EXPERT_KEYS}
        told = (shapes or {}).get(place, {})
        for key, has in expected.items():
            if told.get(key) != has:
                raise ValueError(
                    f"module_shapes: expected {key} {has} of {place}, as the model has, got {told.get(key)}"
                )


def _reshaped(module: Any, changes: dict[str, int], name: str) -> nn.Module:
    """A module of the recorded sizes, with new weights if these sizes differ from the module's own."""
    unknown = [key for key in changes if key not in (*SIZES, *FLAGS)]
    if unknown:
        raise ValueError(f"module_shapes: expected {', '.join((*SIZES, *FLAGS))} of {name}, got {unknown[0]!r}")
    own = recorded_sizes(module)
    sizes = {**own, **changes}
    if sizes == own:
        return module
    columns, rows, rank = sizes["in_features"], sizes["out_features"], sizes.get("rank")
    bias = bool(sizes.get(BIAS))
    like = next(module.parameters())
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    _check_size(own, sizes, name)
    if rank is not None:
        if rank > min(columns, rows):
            raise ValueError(f"module_shapes: expected a rank of {name} up to {min(columns, rows)}, got {rank}")
        return LowRankLinear(columns, rows, rank, bias, bool(sizes.get(SPARSE)), **options)
    if SPARSE in sizes:
        raise ValueError(f"module_shapes: expected a rank with the sparse part of {name}, got none")
    if isinstance(module, Conv1D):
        return Conv1D(rows, columns).to(**options)
    return nn.Linear(columns, rows, bias, **options)


def _check_size(own: dict[str, int], sizes: dict[str, int], name: str) -> None:
    """Checks, before memory is allocated, that a module is not wider than by the config's sizes."""
    for key in ("in_features", "out_features"):
        if sizes[key] > own[key]:
            raise ValueError(f"module_shapes: expected {key} of {name} up to {own[key]}, got {sizes[key]}")
    for key in FLAGS:
        if sizes.get(key, 1) != 1:
            raise ValueError(f"module_shapes: expected 1 for {key} of {name}, got {sizes[key]}")


def number_of(module: Any, key: str) -> Any:
    """The number of that name of a module, or of its config for "config.NAME"; the size for "PARAMETER.DIMENSION"."""
    owner, _, name = key.rpartition(".")
    sized = _sized(module, key)
    if sized is not None:
        return module._parameters[sized[0]].shape[sized[1]]
    return getattr(getattr(module, owner, None) if owner else module, name, None)


def set_number(module: Any, key: str, value: int) -> None:
    """Sets a number of a module; for "config.NAME" the module's own view of its config, in which all else is shared.

    A view has the class and the attributes of the config, also those that are set later, such as the implementation of
    attention.
    """
    owner, _, name = key.rpartition(".")
    if not owner:
        setattr(module, name, value)
        return
    config = module.config
    numbers = {**getattr(type(config), "own_numbers", {}), name: value}
    module.config = view_of(config, numbers)


def view_of(config: Any, numbers: dict[str, int]) -> Any:
    """A view of a config, or of that behind a view, with other numbers."""
    original = getattr(type(config), "viewed", None) or config
    contents: dict[str, Any] = {name: _constant(value) for name, value in numbers.items()}
    contents |= {"own_numbers": numbers, "viewed": original, "__module__": type(original).__module__}
    made: Any = object.__new__(type(type(original).__name__, (type(original),), contents))
    object.__setattr__(made, "__dict__", vars(original))
    return made


def _set_numbers(module: Any, changes: dict[str, int], name: str) -> None:
    factors = {key: value for key, value in changes.items() if key.rpartition(".")[2] in EXPERT_KEYS}
    for key, value in changes.items():
        if key in factors or isinstance(getattr(module, key.rpartition(".")[0], None), LowRankExperts):
            continue
        sized = _sized(module, key)
        if sized is not None:
            _set_size(module, *sized, value, name)
            continue
        vector = module._parameters.get(key)
        if vector is not None and vector.dim() == 1 and value <= len(vector):
            if value == len(vector):
                continue
            setattr(module, key, nn.Parameter(vector.new_empty(value), requires_grad=vector.requires_grad))
            if isinstance(getattr(module, "normalized_shape", None), tuple):
                module.normalized_shape = (value,)
            continue
        own = number_of(module, key)
        if type(own) is not int or key in LAYER_INDEX_ATTRIBUTES or isinstance(module, nn.Embedding):
            raise ValueError(f"module_shapes: expected numbers that {type(module).__name__} {name} has, got {key!r}")
        if value > own:
            raise ValueError(f"module_shapes: expected {key} of {name} up to {own}, got {value}")
        set_number(module, key, value)
    build_expert_factors(module, factors, name)


def _sized(module: Any, key: str) -> tuple[str, int] | None:
    """(parameter, dimension) of a key "PARAMETER.DIMENSION" of a module that has it, else None."""
    parameter, _, dimension = key.rpartition(".")
    own = module._parameters.get(parameter)
    if own is None or not dimension.isdecimal() or not 0 <= int(dimension) < own.dim():
        return None
    return parameter, int(dimension)


def _set_size(module: Any, parameter: str, dimension: int, value: int, name: str) -> None:
    """A new parameter with another size of one dimension; one of that size already is left unchanged."""
    own = module._parameters[parameter]
    shape = list(own.shape)
    if value > shape[dimension]:
        raise ValueError(
            f"module_shapes: expected {parameter}.{dimension} of {name} up to {shape[dimension]}, got {value}"
        )
    if value < shape[dimension]:
        shape[dimension] = value
        setattr(module, parameter, nn.Parameter(own.new_empty(shape), requires_grad=own.requires_grad))


def _constant(value: int) -> property:
    def read(self: Any) -> int:
        return value

    return property(read)
