"""Increment: the update that one adapter adds to a frozen matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from hf_cod.functional.low_rank import gradient_basis, lift, project, truncate
from hf_cod.functional.randomness import generator_of
from hf_cod.layers.replicas import average

TENSORS = ("N", "P", "A", "B", "lost")
PLACE = "owlore_increment"  # what holds the increments in a module


class Increment(nn.Module):
    """D = B A + lift(N, P), added to a frozen matrix W (m, n). B A is the folded update, lift(N, P) the current one.

    While the basis P is fixed and Adam trains N from 0, W + lift(N, P) equals the W that GaLore (arXiv 2403.03507,
    algorithm 2) trains, because the gradient of N is GaLore's projected gradient R. P is computed from the first
    gradient of W after `begin`. That gradient is formed for one matrix at a time inside the backward pass, from the
    matrix's input and the gradient of its output, so no base weight is read and no tensor of W's size is kept. `fold`
    moves lift(N, P) into B A, whose rank is bounded by `max_rank`: the smallest singular values beyond it are cut off,
    and the sum of their squares is added to `lost`.

    While its layer does not train, N takes no memory. P, A and B have no columns or rows until they are needed, in
    saved files, too.

    Args:
        in_features: n.
        out_features: m.
        rank: rank of N and P, at most min(m, n).
        max_rank: maximum rank of B A.
        held: numbers of columns of P and of B, allocated so that tensors of these shapes can be loaded.
        device: device of all tensors.
        dtype: dtype of all tensors; kept if the model is converted to a narrower dtype.
        experts: leading dimensions of all tensors but `lost`; (experts,) in a `BankIncrement`.
    """

    P: Tensor
    A: Tensor
    B: Tensor
    lost: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        max_rank: int,
        held: tuple[int, int] = (0, 0),
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        experts: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.experts = experts
        self.rank, self.max_rank = rank, min(max_rank, in_features, out_features)
        self.tall = out_features >= in_features
        self.shape = (*experts, *((out_features, rank) if self.tall else (rank, in_features)))
        basis, learnt = held
        narrow = min(out_features, in_features)
        self.N = nn.Parameter(torch.zeros(self.shape if basis else 0, device=device, dtype=dtype))
        self.register_buffer("P", torch.zeros(*experts, narrow, basis, device=device, dtype=dtype))
        self.register_buffer("A", torch.zeros(*experts, learnt, in_features, device=device, dtype=dtype))
        self.register_buffer("B", torch.zeros(*experts, out_features, learnt, device=device, dtype=dtype))
        self.register_buffer("lost", torch.zeros((), device=device))
        self.counts: tuple[int, ...] | None = None  # seed of the next basis; set by the optimizer that trains this
        self.resting = False  # whether the optimizer currently trains other layers
        self.searching = False  # whether the basis is computed from the next gradient

    @property
    def has_basis(self) -> bool:
        """Whether P is set, so that N contributes to D."""
        return self.P.shape[-1] > 0

    @property
    def learnt(self) -> int:
        """Rank of B A."""
        return self.A.shape[-2]

    @torch.no_grad()
    def begin(self, *counts: int) -> None:
        """Starts training N. The next gradient determines its basis, unless a resumed run has one already."""
        if self.has_basis and not bool(self.P.any()):  # allocated for values that were not loaded
            self.P = self.P[..., :0].clone()
        self.counts, self.resting, self.searching = counts, False, not self.has_basis
        if self.searching:
            self.N.data = self.N.new_zeros(self.shape)

    @torch.no_grad()
    def rest(self) -> None:
        """Stops training N. If N is 0, its memory is freed; its shape is kept, because compiled graphs depend on it."""
        self.counts, self.resting, self.searching = None, True, False
        self._free()

    def release(self) -> None:
        """Removes the state that an optimizer set, so that another optimizer can train this increment."""
        self.counts, self.resting, self.searching = None, False, False
        self.requires_grad_(True)

    def settle(self) -> None:
        """Ends the search for a basis, after the step whose gradient determined it."""
        self.searching = self.searching and not self.has_basis

    @torch.no_grad()
    def fold(self) -> None:
        """Moves lift(N, P) into B A; D does not change, except for the part that is added to `lost`."""
        if not self.has_basis:
            return
        self.B, self.A, lost = truncate(*self.factors(), self.max_rank)
        self.lost += lost
        self.P, self.searching = self.P[..., :0].clone(), False
        self.N.data = self.N.new_zeros(self.shape)

    @torch.no_grad()
    def fill(self) -> None:
        """Pads B A with zeros to its maximum rank, to measure the memory that it takes."""
        missing = self.max_rank - self.learnt
        self.A = torch.cat([self.A, self.A.new_zeros(*self.experts, missing, self.A.shape[-1])], -2)
        self.B = torch.cat([self.B, self.B.new_zeros(*self.experts, self.B.shape[-2], missing)], -1)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """(m, k) and (k, n), whose product is D; k is at most `max_rank` + `rank`."""
        if not self.has_basis:
            return self.B, self.A
        B, A = (self.N, self.P.mT) if self.tall else (self.P, self.N)
        return torch.cat([self.B, B], -1), torch.cat([self.A, A], -2)

    def dense(self) -> Tensor:
        """D (m, n)."""
        delta = self.B @ self.A
        return delta + lift(self.N, self.P, self.tall) if self.has_basis else delta

    def lost_energy(self) -> float:
        """lost / (lost + ||B A||^2): the share of the squared norm that folds cut off."""
        kept = float((self.B.mT.double() @ self.B.double() * (self.A.double() @ self.A.mT.double())).sum())
        return float(self.lost) / (float(self.lost) + kept) if float(self.lost) else 0.0

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x D^T, of y = x W^T (..., m) and x (..., n), in y's dtype."""
        if self.learnt:
            y = y + _product(x, self.A, self.B, y.dtype)
        if self.searching:
            return self._search(y, x) if torch.is_grad_enabled() and self.N.requires_grad else y
        if self.has_basis:
            A, B = (self.P.mT, self.N) if self.tall else (self.N, self.P)
            return y + _product(x, A, B, y.dtype)
        self._require_optimizer()
        return y

    def _require_optimizer(self) -> None:
        if self.training and torch.is_grad_enabled() and self.N.requires_grad and self.counts is None:
            raise ValueError(
                "optimizer: expected OwLoreAdamW, which OwLore adapters require, got another optimizer or none; pass "
                "optimizer_cls_and_kwargs=owlore(...) to the trainer, or create an OwLoreAdamW for the adapted model"
            )

    @torch.compiler.disable
    def _search(self, y: Tensor, x: Tensor) -> Tensor:
        return _FirstGradient.apply(y, x, self.N, self)

    def project_first(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of N, from the gradient of y and from x; computes the basis if there is none.

        All processes compute the same basis, from the mean of their gradients. A gradient of 0 determines no basis; the
        next gradient is tried. Nor does a gradient that is not finite: the gradient of N is then NaN, which loss
        scaling and `OwLoreAdamW` detect.
        """
        G = grad.flatten(0, -2).mT @ x.flatten(0, -2).to(grad.dtype)
        if not self.has_basis:
            average(G)
        largest = G.abs().amax()
        if not bool(largest.isfinite()):
            return self.N.new_full(self.shape, float("nan"))
        if not bool(largest > 0):
            return self.N.new_zeros(self.shape)
        G.div_(largest)  # squares of large gradients (loss scaling) may overflow, squares of small ones underflow
        if not self.has_basis:
            assert self.counts is not None
            self.P = gradient_basis(G, self.rank, generator_of(*self.counts)).to(self.P.dtype)
        return project(G, self.P).to(self.N.dtype).mul_(largest)

    def _free(self) -> None:
        if not self.has_basis and self.N.numel():
            self.N.data = self.N.new_zeros(()).expand(self.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def precise(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            dtype = torch.promote_types(moved.dtype, tensor.dtype)
            return moved if moved.dtype == dtype else tensor.to(moved.device, dtype)

        super()._apply(precise, recurse)
        if not self.searching:
            self._free()  # moving an expanded tensor allocates memory for each element
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves tensors with elements only: accelerate takes all empty tensors for one shared tensor."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        empty = [] if self.has_basis else ["N", "P"]
        for name in empty if self.learnt else [*empty, "A", "B"]:
            del destination[f"{prefix}{name}"]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the saved tensors with their ranks; tensors that were not saved are empty."""
        if f"{prefix}lost" not in state_dict:
            missing_keys.append(f"{prefix}lost")
            return
        empty = {"N": self.N[:0], "P": self.P[..., :0], "A": self.A[..., :0, :], "B": self.B[..., :0]}
        found = {name: state_dict.get(f"{prefix}{name}", empty.get(name)).detach() for name in TENSORS}
        self._check(found, prefix)
        device = found["lost"].device if self.N.device.type == "meta" else self.N.device
        for name in ("P", "A", "B", "lost"):
            setattr(self, name, found[name].to(device, getattr(self, name).dtype, copy=True))
        if self.N.device.type == "meta":
            empty_N = torch.empty(0, device=device, dtype=self.N.dtype)
            self.N = nn.Parameter(empty_N, requires_grad=self.N.requires_grad)
        self.searching = self.counts is not None and not self.has_basis
        if self.has_basis:
            self.N.data = found["N"].to(device, self.N.dtype, copy=True)
        elif self.searching:
            self.N.data = self.N.new_zeros(self.shape)
        else:
            self._free()

    def check_saved(self, saved: dict[str, Tensor], prefix: str) -> None:
        """Checks saved tensors, of which empty ones are missing, before they are loaded.

        Raises:
            ValueError: they are of another rank, dtype or matrix.
        """
        partners = [{"N", "P"} & saved.keys(), {"A", "B"} & saved.keys()]
        if "lost" not in saved or any(len(pair) == 1 for pair in partners):
            raise ValueError(f"adapter: expected {', '.join(TENSORS)}, got others ({prefix.rstrip('.')})")
        for name, tensor in saved.items():
            if tensor.dtype != getattr(self, name).dtype:
                raise ValueError(
                    f"adapter: expected {name} of another dtype, got {tensor.dtype} ({prefix.rstrip('.')})"
                )
        empty = {"N": self.N[:0], "P": self.P[..., :0], "A": self.A[..., :0, :], "B": self.B[..., :0]}
        self._check({name: saved.get(name, empty.get(name, self.lost)) for name in TENSORS}, prefix)

    def _check(self, found: dict[str, Tensor], prefix: str) -> None:
        """Raises ValueError if tensors are of another rank or of another matrix."""
        rank = found["P"].shape[-1]
        if rank not in (0, self.rank):
            raise ValueError(f"r: expected {rank} as in the saved adapter, got {self.rank} ({prefix.rstrip('.')})")
        m, n = self.B.shape[-2], self.A.shape[-1]
        k = found["A"].shape[-2] if found["A"].dim() > 1 else 0
        inner = {"P": (min(m, n), rank), "A": (k, n), "B": (m, k)}
        shapes = {"N": self.shape, **{name: (*self.experts, *shape) for name, shape in inner.items()}}
        for name in shapes if rank else ("A", "B"):
            if found[name].shape != shapes[name]:
                raise ValueError(
                    f"adapter: expected one of a matrix with {m} outputs and {n} inputs, got {name} of "
                    f"{tuple(found[name].shape)} ({prefix.rstrip('.')})"
                )


class _FirstGradient(torch.autograd.Function):
    """Returns y unchanged; computes the gradient of N in the backward pass, in the basis that is found there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, N: Tensor, increment: Increment) -> Tensor:
        ctx.save_for_backward(x)
        ctx.increment = increment
        return y.clone()  # models may add to it in place (Falcon), which autograd does not allow on a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad, None, ctx.increment.project_first(grad, x), None


def _product(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """x A^T B^T in `dtype`. The factors are cast to it, and so is x, unless it has it already."""
    return linear(linear(x.to(dtype), A.to(dtype)), B.to(dtype)).to(dtype)
