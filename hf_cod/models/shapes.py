"""Modules whose shapes a config's sizes do not tell: low rank, fewer heads, narrower MLPs, another in each layer.

A config records them in one field, `module_shapes`, and the model's own constructor builds them. Name (inside the base
model, so that it holds with every head) -> what differs from the module that the sizes give:

    {"layers.3.mlp.up_proj": {"rank": 64},                      # W = expand reduce
     "layers.3.mlp.gate_proj": {"rank": 64, "sparse": 1},       # W = expand reduce + sparse
     "layers.3.self_attn.q_proj": {"out_features": 256},        # fewer heads ...
     "layers.3.self_attn": {"num_key_value_groups": 1},         # ... and a number that the attention computes with
     "layers.3.mlp.down_proj": {"in_features": 96, "bias": 1}}  # a bias where the family has none

Why in the constructor, and not through the plug-in point of quantizers, which could exchange modules as well: that has
one place, and bits or packed zeros on top of such a model need it; Trainer and PEFT take what it loads for quantized
and refuse to train it; and no model repository can bring a quantizer as remote code. Why not under the stock model
type: without this code a stock class would find no place for the factors, and go on with random weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Of the numbers that a module computes with: more than any has.
MOST = 1 << 24
SIZES = ("in_features", "out_features", "rank")
# 1: there is one
BIAS, SPARSE = FLAGS = ("bias", "sparse")


class LowRankLinear(nn.Module):
    """y = B (A x) + b: a Linear whose matrix W = B A is kept as `reduce` A (rank, in) and `expand` B (out, rank); or
    y = B (A x) + S x + b, with `sparse` S (out, in), most of which is zero.

    All are ordinary Linears, so that whatever works on Linears (adapters, quantization, pruning, statistics, storage
    without zeros) works on them. To PEFT, name those or "all-linear", not the module that holds them.

    Args:
        in_features, out_features: columns and rows of W.
        rank: at least 1, at most the smaller of them.
        bias: whether there is a b; it stands in `expand`.
        sparse: whether there is an S.
        device, dtype: of the tensors.

    Raises:
        ValueError: a rank out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank: expected 1..{min(in_features, out_features)}, got {rank}")
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.sparse = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype) if sparse else None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.expand.in_features

    @property
    def bias(self) -> Tensor | None:
        """b (out,)."""
        return self.expand.bias

    @property
    def weight(self) -> Tensor:
        """W (out, in), made for the reader: a new tensor, in which nothing should be written."""
        product = self.expand.weight @ self.reduce.weight
        return product if self.sparse is None else product + self.sparse.weight

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.expand(self.reduce(input))
        return y if self.sparse is None else y + self.sparse(input)


class ShapedModel:
    """Mixin for model classes, before a class of transformers: builds what the config's `module_shapes` says."""

    config: Any
    base_model: Any

    def post_init(self) -> None:
        """Builds the modules; at the end of every constructor, before weights are initialised or loaded."""
        build_shapes(self.base_model, self.config.module_shapes)
        super().post_init()  # type: ignore[misc]  # a class of transformers follows in the MRO

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, once the config tells the ranks that the model has.

        Raises:
            ValueError: it does not, so that the model could not be loaded again.
        """
        check_recorded(self.base_model, self.config.module_shapes)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # as above


def build_shapes(base: nn.Module, shapes: Any) -> None:
    """Gives modules of a base model the shapes that are recorded; what has its shape already stays as it is.

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
        # Conv1D is the same matrix stored as (in, out); known here once more, because this file travels alone.
        if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, _reshaped(module, changes, name))
        else:
            _set_numbers(module, changes, name)


def recorded_sizes(module: nn.Module) -> dict[str, int]:
    """in_features, out_features, of a LowRankLinear its rank, and a 1 for a sparse part and for a bias."""
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
    """Makes sure that the record tells each LowRankLinear of a base model, its rank, and its sparse part.

    Raises:
        ValueError: one is told wrongly or not at all.
    """
    for name, module in base.named_modules():
        if isinstance(module, LowRankLinear):
            told = (shapes or {}).get(name, {})
            for key, has in (("rank", module.rank), (SPARSE, None if module.sparse is None else 1)):
                if told.get(key) != has:
                    raise ValueError(
                        f"module_shapes: expected {key} {has} of {name}, as the model has, got {told.get(key)}"
                    )


def _reshaped(module: Any, changes: dict[str, int], name: str) -> nn.Module:
    """A matrix of the recorded sizes, with new weights where these differ from the module's own."""
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
        raise ValueError(f"module_shapes: expected a rank beside the sparse part of {name}, got none")
    if isinstance(module, Conv1D):
        return Conv1D(rows, columns).to(**options)
    return nn.Linear(columns, rows, bias, **options)


def _check_size(own: dict[str, int], sizes: dict[str, int], name: str) -> None:
    """Before anything is allocated: modules may be narrower than the config's sizes make them, and not wider."""
    for key in ("in_features", "out_features"):
        if sizes[key] > own[key]:
            raise ValueError(f"module_shapes: expected {key} of {name} up to {own[key]}, got {sizes[key]}")
    for key in FLAGS:
        if sizes.get(key, 1) != 1:
            raise ValueError(f"module_shapes: expected 1 for {key} of {name}, got {sizes[key]}")


def _set_numbers(module: nn.Module, changes: dict[str, int], name: str) -> None:
    for key, value in changes.items():
        if type(getattr(module, key, None)) is not int:
            raise ValueError(f"module_shapes: expected numbers that {type(module).__name__} {name} has, got {key!r}")
        if value > MOST:
            raise ValueError(f"module_shapes: expected {key} of {name} up to {MOST}, got {value}")
        setattr(module, key, value)
