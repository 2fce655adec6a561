"""The experts of a layer: their matrices, however a model stores them, and their router.

Three kinds of storage are known, found by structure and by attributes that count experts:

- a bank: a module with one 3-D parameter (experts, rows, columns) for each matrix, as in most mixtures of transformers;
- a stack: a module with 2-D parameters (experts x rows, columns) of one shape, as in DBRX;
- a list (or a dict) of modules, one for each expert, whose matrices are Linears.

Banks and stacks are stored as (out, in) or as (in, out); the matrices here are (out, in). `expert_routing.py` observes
which tokens enter an expert; `expert_discovery.py` finds the experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_cod.layers.expert_counts import counts_of
from hf_cod.layers.modules import is_linear_like
from hf_cod.layers.orientation import shape_of, turned
from hf_cod.layers.weights import weight_of
from hf_cod.models.expert_parameters import ExpertParameter, ExpertView, parameters_of
from hf_cod.models.factors import LowRankExperts


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """One matrix of each expert, all in one parameter.

    Attributes:
        bank: name of the module that holds the parameter.
        module: that module.
        key: name of the parameter in it.
        experts: their number.
        transposed: whether the matrix of an expert is stored as (in, out).
    """

    bank: str
    module: nn.Module
    key: str
    experts: int
    transposed: bool

    @property
    def name(self) -> str:
        """Its name in statistics, `include` and `exclude`."""
        return f"{self.bank}.{self.key}"

    @property
    def parameter(self) -> Any:
        """The parameter as it is stored; an `ExpertParameter` if it is packed."""
        return getattr(self.module, self.key)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each expert."""
        rows, columns = _block(self.parameter, self.experts)
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def bias(self) -> Any:
        """(experts, out): the biases, as GPT-OSS has them; None without."""
        return getattr(self.module, f"{self.key}_bias", None)

    def parts(self) -> list[ExpertMatrix]:
        """Itself, or the factors that stand in its place; one that all experts share is that of one expert."""
        p = self.parameter
        if not isinstance(p, LowRankExperts):
            return [self]
        counts = {key: 1 if p.shared == f"shared_{key}" else self.experts for key in ("reduce", "expand")}
        return [ExpertMatrix(self.name, p, key, count, False) for key, count in counts.items()]

    def weights(self) -> Tensor:
        """(experts, out, in): a view of the parameter, which must be in memory; decoded, if it is packed."""
        if isinstance(self.parameter, ExpertParameter):
            return torch.stack([*self.parameter.unpack()]).detach()
        return self.matrices_of(self.parameter.detach())

    def matrices_of(self, stored: Tensor) -> Tensor:
        """(experts, out, in): a view of a tensor that has the shape of the parameter."""
        blocks = stored.view(self.experts, *_block(stored, self.experts))
        return blocks.mT if self.transposed else blocks

    def read(self, expert: int) -> Tensor:
        """(out, in): the weight of one expert; a view, if the parameter is in memory; decoded, if it is packed."""
        if isinstance(self.parameter, ExpertParameter):
            return self.parameter.decoded(self.parameter(), expert, torch.float32).detach()
        with align_module_device(self.module):
            return self.weights()[expert]

    @torch.no_grad()
    def write(self, expert: int, W: Tensor) -> None:
        """Replaces the weight (out, in) of one expert.

        Raises:
            ValueError: the parameter is offloaded.
        """
        check_weight_in_memory(self.name, self.parameter)
        self.weights()[expert].copy_(W)

    def place_of(self, W: Any) -> tuple[int | None, bool] | None:
        """(expert, or None for all of them; whether it is turned) if this is a view of the parameter, else None."""
        p = self.parameter
        if W is p:
            return None, False
        if isinstance(W, ExpertView) or isinstance(p, ExpertParameter):
            mine = isinstance(W, ExpertView) and W.parameter is p and not isinstance(W.chosen, Tensor)
            return (W.chosen, W.turned) if mine else None
        if W.dim() not in (2, 3) or W.is_meta or p.device != W.device:
            return None
        place, stored = W.data_ptr() - p.data_ptr(), _block(p, self.experts)
        if not 0 <= place < p.numel() * p.element_size():
            return None
        expert, rest = divmod(place // p.element_size(), math.prod(stored))
        fits = [turned for turned in (False, True) if tuple(W.shape[-2:]) == (stored[::-1] if turned else stored)]
        if not fits or rest or (W.dim() == 3 and len(W) != self.experts):
            return None
        turned = fits[0] if len(fits) == 1 else W.stride(-1) != 1
        return (expert if W.dim() == 2 else None), turned


@dataclass(frozen=True, eq=False)
class ListedMatrix:
    """One matrix of each expert, each in a Linear of its own.

    Attributes:
        name: the name that the Linears have in common, with "*" for the expert.
        linears: name -> Linear, in the order of the experts.
    """

    name: str
    linears: dict[str, nn.Module]

    @property
    def experts(self) -> int:
        """Their number."""
        return len(self.linears)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each expert."""
        return shape_of(next(iter(self.linears.values())))

    def read(self, expert: int) -> Tensor:
        """(out, in): the weight of one expert."""
        return weight_of([*self.linears.values()][expert])

    @torch.no_grad()
    def write(self, expert: int, W: Tensor) -> None:
        """Replaces the weight (out, in) of one expert.

        Raises:
            ValueError: it is offloaded.
        """
        module: Any = [*self.linears.values()][expert]
        check_weight_in_memory(self.name, module.weight)
        module.weight.copy_(turned(module, W))


@dataclass(frozen=True, eq=False)
class Router:
    """The matrix whose rows say to which experts a token goes.

    Attributes:
        name: name of the module that holds the matrix.
        module: that module; a Linear, or one with a parameter of its own.
        key: name of the parameter.
        top_k: number of experts of each token; None if no attribute says it.
    """

    name: str
    module: nn.Module
    key: str
    top_k: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(experts, in)."""
        rows, columns = shape_of(self.module) if is_linear_like(self.module) else getattr(self.module, self.key).shape
        return rows, columns

    @property
    def bias(self) -> Any:
        """(experts,); None without."""
        return getattr(self.module, "bias", None)


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """The experts among which one router chooses, or shared experts, all of which each token enters.

    Attributes:
        name: name of the module around their matrices.
        count: number of experts.
        matrices: in the order of the module; the last one of a bank maps to the output.
        router: None for shared experts, and where none is found.
        shared: whether all tokens enter all of them.
        modules: of a list, the module of each expert.
    """

    name: str
    count: int
    matrices: Sequence[ExpertMatrix | ListedMatrix]
    router: Router | None
    shared: bool = False
    modules: Sequence[nn.Module] = ()

    @property
    def top_k(self) -> int | None:
        """Number of experts of each token; None if it is unknown."""
        return None if self.router is None else self.router.top_k

    @property
    def banked(self) -> list[ExpertMatrix]:
        """The matrices, if they are those of banks; else none."""
        return [matrix for matrix in self.matrices if isinstance(matrix, ExpertMatrix)]

    @property
    def places(self) -> list[str]:
        """Names of the modules that hold the matrices: banks, or the list."""
        return list(dict.fromkeys(matrix.bank for matrix in self.banked)) or [self.name]

    def matrices_of(self, expert: int) -> list[tuple[str, int | None]]:
        """(name of a matrix, expert) of each matrix of one expert; None if the matrix is a module of its own."""
        return [
            (matrix.name, expert) if isinstance(matrix, ExpertMatrix) else ([*matrix.linears][expert], None)
            for matrix in self.matrices
        ]

    def sizes(self) -> list[int]:
        """Number of weights of each expert."""
        found = [0] * self.count
        for matrix in self.matrices:
            for expert in range(self.count):
                found[expert] += math.prod(matrix.shape)
        return found


def check_weight_in_memory(name: str, weight: Tensor) -> None:
    """Checks that a weight has data, which a copy into it would change.

    Raises:
        ValueError: it has none.
    """
    if weight.is_meta:
        raise ValueError(
            f"model: expected weights in memory, got offloaded ones in {name}; load the model without offloading"
        )


def expert_matrices(modules: Iterable[tuple[str, nn.Module]]) -> list[ExpertMatrix]:
    """The matrices of banks and stacks among these modules."""
    return [matrix for name, module in modules for matrix in _of_bank(name, module)]


def _of_bank(name: str, module: nn.Module) -> list[ExpertMatrix]:
    """The matrices that a module holds as parameters of its own. Other 3-D parameters are heads, blocks of a matrix or
    kernels of a convolution.
    """
    own = {key: p for key, p in parameters_of(module) if p.dim() in (2, 3)}
    counts = {value for key, value in vars(module).items() if "expert" in key and type(value) is int}
    banked = {key: p for key, p in own.items() if p.dim() == 3 and p.shape[0] in counts}
    if banked:
        turn = _is_turned(module, [*banked.values()])
        return [ExpertMatrix(name, module, key, len(p), turn) for key, p in banked.items()]
    counts = counts_of(module)
    plain = {key: p for key, p in own.items() if p.dim() == 2 and "bias" not in key}
    for count in counts:
        if count and len(plain) > 1 and len({p.shape for p in plain.values()}) == 1:
            rows = next(iter(plain.values())).shape[0]
            if rows > count and rows % count == 0:
                # All blocks have one shape, so that of the way back is stored the other way round.
                last = [*plain][-1]
                return [ExpertMatrix(name, module, key, count, key == last) for key in plain]
    return []


def _is_turned(module: nn.Module, parameters: list[Any]) -> bool:
    """Whether a bank is stored as (in, out). If no attribute says so: an expert maps a token to a token, so the columns
    of its first matrix (out, in) are as many as the rows of its last one; of gate and up in one matrix, the other two
    numbers differ. Where both readings fit, it is stored as a Linear.
    """
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    first, last = parameters[0].shape, parameters[-1].shape
    return first[2] != last[1] and first[1] == last[2]


def _block(stored: Tensor, experts: int) -> tuple[int, int]:
    """(rows, columns) of one expert, as they are stored."""
    return stored.shape[-2] // (experts if stored.dim() == 2 else 1), stored.shape[-1]
