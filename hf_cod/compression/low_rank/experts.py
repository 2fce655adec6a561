"""The matrices of banks of experts as factors, one rank for all experts of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.compression.low_rank.settings import OWN, SHARED
from hf_cod.functional import factorization
from hf_cod.functional.damping import LEAST_TOKENS, shrunk
from hf_cod.functional.expert_factorization import (
    expand_spectrum,
    lost_share,
    reduce_spectrum,
    shared_expand,
    shared_reduce,
)
from hf_cod.functional.ranks import Shape
from hf_cod.layers.experts import ExpertMatrix
from hf_cod.layers.module_choice import by_place
from hf_cod.layers.stack import DecoderLayers
from hf_cod.models.expert_parameters import parameters_of
from hf_cod.models.factors import LowRankExperts

EXPAND, REDUCE = "shared_expand", "shared_reduce"


@dataclass(frozen=True, eq=False)
class BankMatrix:
    """One matrix of each expert, to be factorized.

    Attributes:
        matrix: the matrices.
        last: whether they map to the output of the experts.
        basis: a key of `settings.EXPERT_BASES`.
    """

    matrix: ExpertMatrix
    last: bool
    basis: str

    @property
    def shared(self) -> str | None:
        """The factor that all experts share: the one on the side of the hidden state, which they have in common."""
        return None if self.basis == OWN else EXPAND if self.last else REDUCE

    @property
    def shape(self) -> Shape:
        """As `functional/ranks.py` counts weights: (experts, out, in), or that of the matrices side by side, if they
        share a factor.
        """
        (out, width), count = self.matrix.shape, self.matrix.experts
        return {None: (count, out, width), EXPAND: (out, count * width), REDUCE: (count * out, width)}[self.shared]

    def spectrum(self, W: Tensor, moments: Moments) -> Tensor:
        """What truncations lose, as `ranks_of_spectra` takes it.

        Args:
            W: (experts, out, in).
            moments: of the inputs.
        """
        if self.shared is not None:
            return (expand_spectrum if self.last else reduce_spectrum)(W, moments.own)
        without = all(H is None for H in moments.own)
        found = [
            factorization.spectrum(W_e, H) for W_e, H in zip(W, moments.own, strict=True) if without or H is not None
        ]
        return torch.stack(found).sum(0)

    def factors(self, W: Tensor, rank: int, moments: Moments) -> tuple[Tensor, Tensor, float]:
        """B, A as `LowRankExperts` holds them, and the lost share of the energy of the outputs.

        Args:
            W: (experts, out, in).
            rank: that of each expert.
            moments: of the inputs.
        """
        if self.shared is not None:
            B, A = (shared_expand if self.last else shared_reduce)(W, rank, moments.own)
        else:
            pairs = [factorization.factorize(W_e, rank, H)[:2] for W_e, H in zip(W, moments.filled, strict=True)]
            B, A = (torch.stack(each) for each in zip(*pairs, strict=True))
        return B, A, lost_share(W, B, A, moments.seen)

    def put(self, rank: int, B: Tensor, A: Tensor) -> LowRankExperts:
        """Replaces the parameter by these factors.

        Raises:
            ValueError: other shapes; NaN or infinity.
        """
        bank, key, parameter = self.matrix.module, self.matrix.key, self.matrix.parameter
        place = [name for name, _ in parameters_of(bank)].index(key)
        stored = (parameter.shape, self.matrix.experts, self.matrix.transposed, place, parameter.dtype)
        made = LowRankExperts(*stored, rank, self.shared, device="meta")
        for name, values in (("reduce", A), ("expand", B)):
            shape = tuple(getattr(made, name).shape)
            if tuple(values.shape) != shape:
                raise ValueError(f"{self.matrix.name}: expected {name} of shape {shape}, got {tuple(values.shape)}")
            values = values.to(device=parameter.device, dtype=parameter.dtype)
            if not values.isfinite().all():
                raise ValueError(f"weights: expected finite factors, got NaN or infinity of {self.matrix.name}")
            setattr(made, name, nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad))
        delattr(bank, key)
        setattr(bank, key, made.train(bank.training))
        return made


@dataclass
class Moments:
    """X^T X of the inputs of one matrix of each expert.

    Attributes:
        seen: of the tokens that were routed to an expert; None without tokens.
        own: the same, `shrunk` by the number of tokens; None below `LEAST_TOKENS` of the input channels.
        filled: in place of None, those of all experts together, if these have the same kind of input: each channel of
            the last matrix is the expert's own.
        unseen, few: the experts without tokens, and those with too few.
    """

    seen: list[Tensor | None]
    own: list[Tensor | None]
    filled: list[Tensor | None]
    unseen: list[int] = field(default_factory=list)
    few: list[int] = field(default_factory=list)


def moments_of(bank: BankMatrix, sums: ProductsRecorder | None) -> Moments:
    """The moments of a matrix; none without sums."""
    matrix = bank.matrix
    if sums is None:
        nothing: list[Tensor | None] = [None] * matrix.experts
        return Moments(nothing, nothing, nothing)
    least = LEAST_TOKENS * matrix.shape[1]
    tokens = [sums.count(matrix.name, expert) for expert in range(matrix.experts)]
    seen = [sums.of(matrix.name, expert) for expert in range(matrix.experts)]
    few = [expert for expert, n in enumerate(tokens) if 0 < n < least]
    own = [None if H is None or n < least else shrunk(H, n) for H, n in zip(seen, tokens, strict=True)]
    known = [H for H in seen if H is not None]
    common = shrunk(torch.stack(known).sum(0), sum(tokens)) if known and not bank.last else None
    filled = [common if H is None else H for H in own]
    return Moments(seen, own, filled, [expert for expert, n in enumerate(tokens) if not n], few)


def bank_matrices(stack: DecoderLayers, index: int, basis: str) -> dict[str, BankMatrix]:
    """Name -> each matrix of the banks of a layer that is not excluded."""
    last = {experts.banked[-1].name for experts in stack.expert_sets(index) if experts.banked}
    found = [matrix for matrix in stack.expert_matrices(index) if math.prod(matrix.shape)]
    return {matrix.name: BankMatrix(matrix, matrix.name in last, basis) for matrix in found}


def check_basis(stack: DecoderLayers, basis: str) -> None:
    """Checks that there are experts which can share a basis.

    Raises:
        ValueError: there are none, or they are Linears of their own.
    """
    if basis != SHARED or any(stack.expert_matrices(index) for index in range(len(stack))):
        return
    listed = any(stack.expert_sets(index) for index in range(len(stack)))
    got = "experts that are Linears, each factorized on its own" if listed else "none to factorize"
    raise ValueError(f"expert_basis: expected {OWN} for a model without banks of experts, got {basis}, and {got}")


def without_banks(stack: DecoderLayers) -> tuple[DecoderLayers, list[str]]:
    """The layers without the matrices of banks, and a sentence for a report if there are any: oats keeps them."""
    found = [matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)]
    if not found:
        return stack, []
    names, weights = [matrix.name for matrix in found], sum(matrix.parameter.numel() for matrix in found)
    told = f"{len(found)} matrices of {weights:,} weights are not factorized: oats keeps banks of experts"
    return replace(stack, excluded=stack.excluded | {*names}), [f"{told}: {'; '.join(by_place(names))}"]
