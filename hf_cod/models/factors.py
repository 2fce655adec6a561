"""Matrices as products of two thin ones: of a Linear, and of each expert of a bank."""

from typing import Any

import torch
from torch import Tensor, nn

from .expert_parameters import ExpertParameter, parameters_of

# What a config records of the factors of one matrix of a bank, after the name of its parameter: the rank, the number of
# experts, 1 if matrices are stored as (in, out), and 1 for the factor that the experts share.
EXPERT_KEYS = RANK, EXPERTS, TRANSPOSED, *SHARED = ("rank", "experts", "transposed", "shared_reduce", "shared_expand")


class LowRankLinear(nn.Module):
    """A Linear with a factorized matrix W = B A, and optionally a sparse part S.

        y = B (A x) + b,  or  y = B (A x) + S x + b

    `reduce` holds A (rank, in), `expand` B (out, rank) and b, `sparse` S (out, in), most of which is zero. All are
    ordinary Linears, so everything that works on Linears (adapters, quantization, pruning, statistics, sparse storage)
    works on them. In PEFT's `target_modules`, name them or use "all-linear"; do not name this module.

    Args:
        in_features, out_features: columns and rows of W.
        rank: at least 1, at most the smaller of them.
        bias: whether there is a bias b, in `expand`.
        sparse: whether there is a sparse part S.
        device, dtype: device and dtype of the tensors.

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
    def in_features(self) -> int:
        """Columns of W; a model may read it."""
        return self.reduce.in_features

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.expand.out_features

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
        """W (out, in), computed on each access; writing to it has no effect on the module."""
        product = self.expand.weight @ self.reduce.weight
        return product if self.sparse is None else product + self.sparse.weight

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.expand(self.reduce(input))
        return y if self.sparse is None else y + self.sparse(input)


class LowRankExperts(ExpertParameter):
    """One matrix of each expert of a bank, factorized: W_e = B_e A_e. Stands in the place of the bank's parameter.

    `reduce` holds A (experts, rank, in), or (rank, in) if the experts share it; `expand` holds B (experts, out, rank),
    or (out, rank). A token is multiplied by the factors of its experts only. Biases of the bank are unchanged. Factors
    may be packed: `ExpertParameter`s in their places, of one expert for a factor that all share.

    Args:
        shape, experts, transposed, place, dtype: see `ExpertParameter`.
        rank: at least 1, at most `full_rank`.
        shared: "shared_reduce", "shared_expand", or None if each expert has factors of its own.
        device: of the tensors.

    Raises:
        ValueError: a rank out of range.
    """

    def __init__(
        self,
        shape: torch.Size,
        experts: int,
        transposed: bool,
        place: int,
        dtype: torch.dtype,
        rank: int,
        shared: str | None = None,
        device: Any = None,
    ):
        super().__init__(shape, experts, transposed, place, dtype)
        self.rank, self.shared = rank, shared
        if not 1 <= rank <= self.full_rank:
            raise ValueError(f"rank: expected 1..{self.full_rank}, got {rank}")
        out, width = self.matrix_shape
        self.reduce = self._factor("reduce", rank, width, device)
        self.expand = self._factor("expand", out, rank, device)

    @property
    def full_rank(self) -> int:
        """The smaller number of rows and columns of a matrix; of the matrices side by side, if they share a factor."""
        out, width = self.matrix_shape
        rows = out * (self.experts if self.shared == "shared_reduce" else 1)
        return min(rows, width * (self.experts if self.shared == "shared_expand" else 1))

    def numel(self) -> int:
        """Number of weights of the factors."""
        return self.reduce.numel() + self.expand.numel()

    def forward(self) -> tuple[Any, Any]:
        """(B, A); of packed ones what their `forward` returns."""
        B, A = (part() if isinstance(part, ExpertParameter) else part for part in (self.expand, self.reduce))
        return B, A

    def product(self, tensors: Any, x: Tensor, expert: int) -> Tensor:
        """x (..., in) times W^T of one expert: (..., out) in x's dtype."""
        B, A = tensors
        return self._times("expand", B, self._times("reduce", A, x, expert), expert)

    def decoded(self, tensors: Any, expert: int, dtype: torch.dtype) -> Tensor:
        """W (out, in) of one expert, as a new tensor."""
        B, A = tensors
        high = torch.promote_types(self.dtype, torch.float32)
        return (self._read("expand", B, expert, high) @ self._read("reduce", A, expert, high)).to(dtype)

    def factor(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """One factor of an expert, "reduce" or "expand"."""
        return self._read(name, self()[0 if name == "expand" else 1], expert, dtype)

    def _factor(self, name: str, rows: int, columns: int, device: Any) -> nn.Parameter:
        """A random one, for models that are built without a checkpoint: families initialise only what they know."""
        size = (rows, columns) if self.shared == f"shared_{name}" else (self.experts, rows, columns)
        return nn.Parameter(torch.randn(size, dtype=self.dtype, device=device) / columns**0.5)

    def _times(self, name: str, stored: Any, x: Tensor, expert: int) -> Tensor:
        """x times the transpose of one factor of an expert; `stored` is what `forward` returned of it."""
        own = getattr(self, name)
        if isinstance(own, ExpertParameter):
            return own.product(stored, x, 0 if own.experts == 1 else expert)
        return nn.functional.linear(x, self._read(name, stored, expert, x.dtype))

    def _read(self, name: str, stored: Any, expert: int, dtype: torch.dtype) -> Tensor:
        own = getattr(self, name)
        if isinstance(own, ExpertParameter):
            return own.decoded(stored, 0 if own.experts == 1 else expert, dtype)
        factor: Tensor = stored if stored.dim() == 2 else stored[expert]
        return factor.to(dtype)

    def extra_repr(self) -> str:
        """The description in `print(model)`."""
        return f"{tuple(self.shape)}, rank={self.rank}" + (f", {self.shared}" if self.shared else "")


def recorded_experts(module: LowRankExperts, key: str) -> dict[str, int]:
    """What `module_shapes` records of the factors in the place of the parameter `key`, see `EXPERT_KEYS`."""
    found = {f"{key}.{RANK}": module.rank, f"{key}.{EXPERTS}": module.experts}
    found |= {f"{key}.{TRANSPOSED}": 1} if module.transposed else {}
    return found | ({f"{key}.{module.shared}": 1} if module.shared else {})


def build_expert_factors(bank: Any, changes: dict[str, int], name: str) -> None:
    """Puts factors, with new weights, in the place of parameters of a bank; those it has already are left unchanged.

    Args:
        bank: the module.
        changes: what is recorded of all its factors.
        name: of the bank, for messages.

    Raises:
        ValueError: no parameter of the bank, or numbers that do not fit it.
    """
    for key in dict.fromkeys(changed.rpartition(".")[0] for changed in changes):
        told = {kind: changes[f"{key}.{kind}"] for kind in EXPERT_KEYS if f"{key}.{kind}" in changes}
        own: Any = getattr(bank, key, None)
        if isinstance(own, LowRankExperts):
            if recorded_experts(own, key) != {f"{key}.{kind}": value for kind, value in told.items()}:
                raise ValueError(f"module_shapes: expected {recorded_experts(own, key)} of {name}, got {told}")
            continue
        shared: list[Any] = [kind for kind in SHARED if kind in told]
        if not _is_bank(own, told) or len(shared) > 1:
            raise ValueError(f"module_shapes: expected factors of the experts of {name}, got {told} of {key!r}")
        place = [other for other, _ in parameters_of(bank)].index(key)
        stored = (own.shape, told[EXPERTS], TRANSPOSED in told, place, own.dtype)
        try:
            made = LowRankExperts(*stored, told[RANK], shared[0] if shared else None, own.device)
        except ValueError as error:
            raise ValueError(f"module_shapes: {name}.{key}: {error}") from None
        delattr(bank, key)
        setattr(bank, key, made)


def _is_bank(parameter: Any, told: dict[str, int]) -> bool:
    """Whether this is a parameter of as many experts as are recorded."""
    experts = told.get(EXPERTS)
    if not isinstance(parameter, nn.Parameter) or experts is None or RANK not in told:
        return False
    rows = parameter.shape[0] if parameter.dim() == 3 else 0
    return rows == experts or (parameter.dim() == 2 and parameter.shape[0] % experts == 0)
