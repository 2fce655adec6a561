"""OwLoreAdamW: trains a few layers at a time, sampled by their scores, with low-rank moments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Unpack

import torch
from torch import nn

from hf_cod.functional.randomness import generator_of
from hf_cod.io.arguments import checked
from hf_cod.io.module_names import without_unset
from hf_cod.io.settings import resolve
from hf_cod.layers.devices import check_in_memory, check_not_offloaded
from hf_cod.layers.replicas import broadcast_weights, digest_bits, digest_structure, digest_weights, processes, together
from hf_cod.layers.stack import unwrap
from hf_cod.layers.stock_four_bit import keep_unpacked
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.active_layers import SHARDED, ActiveLayers, refuse_shards, release
from hf_cod.training.owlore.eight_bit import codebook
from hf_cod.training.owlore.fitting import check_rank, fitted, ranks
from hf_cod.training.owlore.moments import adam_direction, apply_direction, is_projected, refresh_basis
from hf_cod.training.owlore.optimizer_state import KEY, check_state, states_of
from hf_cod.training.owlore.sampling import make_sampler
from hf_cod.training.owlore.settings import DEFAULT_LR, OwLoreFields, OwLoreSettings, check_hyperparameters
from hf_cod.training.owlore.trained_increments import Increments
from hf_cod.training.owlore.update_in_backward import UpdateInBackward

logger = logging.getLogger(__name__)

# Consecutive steps with gradients that are not finite, after which training is aborted.
PATIENCE = 10
_BASIS, _ROUNDING = 1, 2  # purpose of a generator, part of its seed


class OwLoreAdamW(torch.optim.Optimizer):
    """AdamW that trains `n_active` layers at a time, each matrix in the low-rank space of its gradient.

    OwLore (Li et al. 2024, arXiv 2405.18380, algorithm 1; later OWS): every `interval` steps (a sampling round) layers
    are sampled without replacement, with probability proportional to their scores (`LayerSampler`). The other layers
    are frozen: they need neither gradients nor moments, and the backward pass ends at the lowest active layer. The
    gradient of a matrix is projected (GaLore, arXiv 2403.03507) on the leading directions of its first gradient in each
    round. `scores=None` with `rank=None` is LISA (arXiv 2403.17919); with all layers active it is GaLore.

        optimizer = OwLoreAdamW(model, scores, lr=3e-4)                             # in a custom training loop
        Trainer(model, args, optimizer_cls_and_kwargs=owlore(scores, lr=3e-4))      # in Trainer and TRL

    Differences from the authors' code: layers are sampled inside `step`, and a resumed run continues with the same
    layers; moments are float32 for bfloat16 weights; the optimizer state of layers that are no longer sampled is
    dropped (or kept, or offloaded); a layer that is sampled again gets a new basis; no layer has probability 0
    (`floor`). Embeddings and head are frozen by default. The norm after the last layer always trains, in full rank.

    In a model with PEFT adapters only the adapters train, those of a few layers at a time. LoRA adapters require
    `rank=None`. OwLore adapters (`OwLoreConfig`) have a rank of their own: their gradients are projected gradients
    already, in a basis from the first gradient of each round, and their update is folded at the end of the round.

    This optimizer averages the gradients of layers over processes, because the layers are excluded from DDP. Therefore
    all processes must create it with the same settings and scores, before DDP wraps the model; each process gets the
    weights of the first. A step with gradients that are not finite updates nothing and logs a warning; ten such steps
    in a row raise an error.

    Args:
        model: a transformers model on its device, before it is wrapped. Frozen parameters stay frozen, except for those
            that an earlier OwLoreAdamW of this model froze.
        scores: `LayerScores` of this model, or a `LayerAllocation` of "probability"; None: the same probability for all
            layers. Layers without trainable parameters are not sampled.
        lr: learning rate.
        betas: Adam's betas.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        settings: `OwLoreSettings`, instead of single fields.
        **fields: fields of `OwLoreSettings` by name: n_active, interval, rank, ...; `include` and `exclude` choose the
            matrices that train, as PEFT's target_modules and exclude_modules; norms train in each layer with one.

    Raises:
        ValueError: bad settings, more layers than the model has, a rank above a layer's width, scores of another model,
            weights on the meta device or offloaded, sharded parameters, a model that DDP has wrapped already, processes
            that differ; in `step`: ten steps in a row with gradients that are not finite.
        ImportError: 8-bit moments without bitsandbytes.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        scores: LayerScores | LayerAllocation | None = None,
        *,
        lr: float = DEFAULT_LR,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        settings: OwLoreSettings | None = None,
        **fields: Unpack[OwLoreFields],
    ) -> None:
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        try:
            with together("make an OwLoreAdamW") as alike:
                self._make(model, scores, resolve(OwLoreAdamW, OwLoreSettings, settings, fields), common)
                alike |= {**asdict(self.settings), **common, **self.increments.described()}
                alike |= {"scores": self.sampler.probabilities, "model": digest_structure(model)}
            broadcast_weights(model)
        except Exception:
            if hasattr(self, "layers"):
                self.release()
            raise

    def _make(
        self,
        model: nn.Module,
        scores: LayerScores | LayerAllocation | None,
        settings: OwLoreSettings,
        common: dict[str, Any],
    ) -> None:
        self.settings = settings
        check_hyperparameters(**common)
        if self.settings.moments == "8bit":
            codebook(signed=True), codebook(signed=False)  # now, rather than in a step, if bitsandbytes is missing
        check_in_memory(unwrap(model))
        others = ["norm", "embeddings"] if self.settings.train_embeddings else ["norm"]
        self.layers = ActiveLayers(model, others, self.settings)
        check_not_offloaded(unwrap(model), [p for layer in self.layers.layers for p in layer])
        self.increments = Increments(list(self.layers.stack), self.layers.layers)
        self.settings = fitted(self.increments.settings(self.settings), self.layers)
        self.sampler = make_sampler(scores, self.layers, self.settings)
        check_rank(self.settings.rank, self.layers)
        keep_unpacked(model)
        groups: list[dict[str, Any]] = [{"params": p, "layer": i} for i, p in enumerate(self.layers.layers) if p]
        if self.layers.always:
            groups.append({"params": self.layers.always, "layer": None})
        super().__init__(groups, {**common, "scale": self.settings.scale})
        self.steps, self._failures, self._compared = 0, 0, False
        self._numbers = {p: number for number, (p, _) in enumerate(self._parameters())}
        self._shapes = self.increments.shapes(self._numbers)
        self.ranks = ranks(self.layers, self.settings.rank)
        self._fused = UpdateInBackward(self.update, self._numbers) if self.settings.fused else None
        self._step_supports_amp_scaling = self.settings.fused  # GradScaler then calls `step`, which raises the error
        self.layers.end_at_lowest()
        self._activate()

    @property
    def draw(self) -> int:
        """Number of the current sampling round, from 0."""
        return self.steps // self.settings.interval

    @property
    def active(self) -> list[int]:
        """The layers that currently train."""
        return self.layers.active

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the active layers; after each `interval` steps, samples new ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._compare()
        if self._fused is not None:
            self._fused.end_step(scaled=hasattr(self, "found_inf"))
        elif self._finite():
            for parameter, group in self._trained():
                self._update(parameter, group)
        self.increments.settle()
        self.layers.end_at_lowest()  # checkpointing may have been turned on since
        self.steps += 1
        if self.steps % self.settings.interval == 0:
            self.increments.fold()
            self._activate()
        return loss

    def release(self) -> None:
        """Unfreezes the parameters that this optimizer froze and removes its hooks; it cannot be used afterwards.

        A new OwLoreAdamW of the same model does this automatically.
        """
        release(self.layers.model)

    def state_dict(self) -> dict[str, Any]:
        """Moments, bases and the number of steps: everything that an exact resume requires."""
        return {
            **super().state_dict(),
            KEY: {"steps": self.steps, "shapes": [*self._shapes.values()], **self._described()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`, in its own precision, and activates the layers of its step.

        Raises:
            ValueError: the state is of another optimizer, of other settings or of another model, or processes differ.
        """
        with together("load the state of an OwLoreAdamW") as alike:
            self._load(state_dict)
            moments = (tensor for state in self.state.values() for tensor in state.values())
            alike |= {"steps": self.steps, "state_dict": digest_bits(moments)}
        self._compared = False

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved = check_state(state_dict, self._described(), self.param_groups, [*self._shapes.values()])
        for group, other in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        self.state = states_of(state_dict, self.param_groups)
        self.steps = int(saved["steps"])
        self._activate()

    def _compare(self) -> None:
        """Before the first update, checks that weights and gradients are the same on all processes.

        Weights may have been loaded since the optimizer was created, and DDP averages the parameters that always train.
        """
        if self._compared or processes() == 1:
            return
        with together("make a step of OwLoreAdamW") as alike:
            rates = [group["lr"] for group in self.param_groups]
            gradients = digest_bits(p.grad for p, _ in self._trained() if p.grad is not None)
            weights = digest_weights(self.layers.model)
            alike |= {"steps": self.steps, "lr": rates, "model's weights": weights, "gradients": gradients}
        self._compared = True

    def _described(self) -> dict[str, Any]:
        """The settings that must be the same when a run is resumed, as plain numbers and strings."""
        free = ("fused", "deselected")
        settings = {k: v for k, v in without_unset(asdict(self.settings)).items() if k not in free}
        probabilities = [round(p, 12) for p in self.sampler.probabilities]
        return {**settings, **self.increments.described(), "probabilities": probabilities}

    def _parameters(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, group

    def _trained(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """The active parameters that have a gradient.

        Raises:
            ValueError: no layer has a gradient, or shapes of parameters have changed.
        """
        active = [(p, g) for p, g in self._parameters() if g["layer"] is None or g["layer"] in self.active]
        found = [(p, group) for p, group in active if p.grad is not None]
        if not any(group["layer"] is not None for _, group in found):
            refuse_shards(self.layers.model)
            raise ValueError(
                "gradients: expected gradients of active layers, got none; call backward before step, on the model "
                "that the optimizer was created for"
            )
        if any(self._shapes.get(p) != list(p.shape) for p, _ in found):
            raise ValueError(SHARDED)
        return found

    def _activate(self) -> None:
        """Activates the layers of the current sampling round; drops, keeps or offloads the state of the others."""
        self.layers.activate(self.sampler.draw(self.draw))
        self.increments.begin(self.active, self.settings.seed, self.draw)
        if self.settings.deselected == "keep":
            return
        for parameter, group in self._parameters():
            if group["layer"] is None or group["layer"] in self.active:
                continue
            if self.settings.deselected == "drop":
                self.state.pop(parameter, None)
            elif parameter in self.state:
                self.state[parameter] = {k: v.cpu() for k, v in self.state[parameter].items()}

    def update(self, parameter: nn.Parameter) -> None:
        """Updates one parameter by its gradient; with `fused`, the backward pass calls this."""
        self._update(parameter, next(g for g in self.param_groups if any(p is parameter for p in g["params"])))

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        grad, state, number = parameter.grad, self.state[parameter], self._numbers[parameter]
        assert grad is not None
        for key in state.keys() - {"step", "draw"}:
            state[key] = state[key].to(parameter.device)  # the state may have been offloaded
        rank, seed = self.ranks.get(id(parameter)), self.settings.seed
        if is_projected(parameter, rank):
            refresh_basis(state, grad, rank or 0, self.draw, generator_of(seed, self.draw, number, _BASIS))
        N = adam_direction(state, grad, group["betas"], group["eps"], self.settings.moments == "8bit")
        generator: torch.Generator | None = None
        if parameter.dtype == torch.bfloat16 and self.settings.rounding == "stochastic":
            generator = generator_of(seed, self.steps, number, _ROUNDING, device=parameter.device)
        apply_direction(parameter, N, state.get("basis"), group, generator)

    def _finite(self) -> bool:
        """Whether all gradients are finite; counts the steps where they are not, and logs a warning."""
        grads = [p.grad for p, _ in self._trained() if p.grad is not None and p.grad.numel()]
        norms = torch.stack([norm.to(grads[0].device) for norm in torch._foreach_norm(grads, ord=float("inf"))])
        if bool(norms.isfinite().all()):
            self._failures = 0
            return True
        self._failures += 1
        if self._failures >= PATIENCE:
            raise ValueError(
                f"gradients: expected finite numbers, got NaN or infinity in {PATIENCE} consecutive steps; lower the "
                "learning rate"
            )
        logger.warning(f"step {self.steps}: gradients are not finite; the update is skipped")
        return False
