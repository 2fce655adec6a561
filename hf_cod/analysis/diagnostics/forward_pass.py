"""Measures from one forward pass per batch: angular distance of all layer pairs, block influence, output variance."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.settings import FORWARD_METRICS, Token
from hf_cod.functional import depth
from hf_cod.io.deprecation import renamed
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.direct_use import has_tokens_first
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_calls import check_first_call
from hf_cod.layers.running import (
    NonFiniteError,
    evaluation_mode,
    hidden_input,
    hidden_output,
    one_vector,
    progress,
)
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

# With token "all", pair matrices of this number of tokens are in memory at a time, (L + 1)^2 numbers each.
TOKEN_CHUNK = 64


@dataclass(frozen=True)
class ForwardMeasures:
    """Measures of every layer and sample; S samples, L layers, all on the CPU.

    Attributes:
        distances: (S, L + 1, L + 1) float64, angular distance in [0, 1] between the inputs of layers l and m (index L:
            the output of the last layer). Empty if not requested.
        influence: (S, L), block influence of each layer. Empty if not requested.
        outputs: (L + 1, 4), `depth.moments` of the stack's input and of each layer's output, over all samples' tokens.
        updates: (L, 4), `depth.moments` of each layer's update: its output minus its input.
        dtype: dtype of the hidden states; the least precise one if there are several.
        not_run: layers that the model passed over on all of these inputs, such as cross-attention without images. Their
            output is their input.
    """

    distances: Tensor
    influence: Tensor
    outputs: Tensor
    updates: Tensor
    dtype: torch.dtype
    not_run: tuple[int, ...] = ()

    def angular_distance(self) -> Tensor:
        """(L, L): mean distance d(x^l, x^(l+n)) at [l, n - 1], NaN where l + n > L."""
        return depth.by_layer_and_step(self.distances.mean(0))

    def idle_below(self) -> float:
        """The angular distance that rounding alone can cause; layers with a smaller one have no measurable effect."""
        return depth.angular_resolution(self.dtype)

    def output_variance(self) -> dict[str, list[float]]:
        """For each layer's output over all tokens and channels: variance (population), mean, max_abs; and added_share,
        the variance of the layer's update x^(l+1) - x^l over that of its output x^(l+1).

        Output variance is the quantity of Figure 1 in arXiv 2502.05795.
        """
        mean, variance = _mean_and_variance(self.outputs[1:])
        _, update_variance = _mean_and_variance(self.updates)
        return {
            "variance": variance.tolist(),
            "mean": mean.tolist(),
            "max_abs": self.outputs[1:, 3].tolist(),
            "added_share": (update_variance / variance).tolist(),
        }


@renamed(path="layers_path")
def measure_forward(
    model: nn.Module,
    batches: Sequence[Batch],
    metrics: Collection[str] = FORWARD_METRICS,
    token: Token = "last",
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> ForwardMeasures:
    """Measures all layers in one forward pass per batch, without the head.

    Hidden states are read by hooks at the layers, so the last one is the output of the last layer. (In the
    `hidden_states` that transformers returns the last one is the output of the final norm.) If a model has several
    residual streams (mHC, AltUp), x^l are those of a token as one vector. Tokens that a model adds inside, such as
    prompts, count like those of the inputs; then padding and token "first" are refused.

    Args:
        model: a transformers model, wrapped or not, in any dtype; also offloaded by accelerate.
        batches: dicts for the model's forward; attention_mask (S, T) marks padding on either side.
        metrics: some of `FORWARD_METRICS`.
        token: token at which angles are measured: the last or first that is not padding, or the mean over all of them.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Raises:
        NonFiniteError: NaN or infinite activations (says in which layer first).
        ValueError: no layers found; a model without weights; one that runs a layer several times, or whose layers
            return something else than their hidden state.
    """
    if token not in ("last", "first", "all"):
        raise ValueError(f"token: expected 'last', 'first' or 'all', got {token!r}")
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    recorder = ForwardRecorder(stack, metrics, token)
    device = execution_device(stack.model)
    with torch.no_grad(), evaluation_mode(stack), recorder.attached():
        for number, batch in enumerate(progress(batches, "forward pass", show_progress)):
            inputs = model_inputs(to_device(batch, device))
            recorder.start(stack.mask(inputs), len(next(iter(inputs.values()))), stack.count_tokens(inputs))
            stack.trunk(**inputs)
            recorder.finish(number)
    return recorder.measures()


class ForwardRecorder:
    """Hooks that read each layer's input and output and keep only the data for the measures.

    Call `start` before and `finish` after each forward pass, within `attached`.
    """

    def __init__(self, stack: DecoderLayers, metrics: Collection[str], token: Token) -> None:
        unknown = set(metrics) - set(FORWARD_METRICS)
        if unknown:
            raise ValueError(f"metrics: expected some of {FORWARD_METRICS}, got {sorted(unknown)}")
        self.stack, self.metrics, self.token = stack, metrics, token
        self._distances: list[Tensor] = []
        self._influence: list[Tensor] = []
        self._outputs = torch.zeros(len(stack) + 1, 4, dtype=torch.float64)
        self._updates = torch.zeros(len(stack), 4, dtype=torch.float64)
        self._dtype = torch.float32
        self._mask: Tensor | None = None
        self._ran: set[int] = set()
        self.start(None, 0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Adds the hooks to the layers, and removes them at the end of the block."""
        handles = [
            layer.register_forward_hook(self._hook_of(index), with_kwargs=True)
            for index, layer in enumerate(self.stack)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, mask: Tensor | None, samples: int, tokens: int | None = None) -> None:
        """Starts a batch of `samples` samples of `tokens` tokens (None: unknown) with its attention mask (S, T), or
        None.
        """
        self._samples, self._tokens = samples, tokens
        self._square = has_tokens_first(self.stack, samples, tokens)
        # For a mask without padding a gather is avoided.
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        # By number of the state, or of the layer.
        self._called: set[int] = set()
        self._states: dict[int, Tensor] = {}
        self._batch_influence: dict[int, Tensor] = {}
        self._batch_outputs: dict[int, Tensor] = {}
        self._batch_updates: dict[int, Tensor] = {}

    def finish(self, number: int) -> None:
        """Ends a batch: checks it and adds it to the sums."""
        L = len(self.stack)
        if not self._batch_outputs:
            raise ValueError(
                f"batches: expected inputs on which the layers of {self.stack.layers_path} run, got others as batch "
                f"{number}, or a model that runs them without calling them"
            )
        outputs = _rows_on_cpu(depth.carried(self._batch_outputs, L + 1))
        updates = _rows_on_cpu(depth.completed(self._batch_updates, L, counted=True))
        self._check_finite(outputs, number)
        if "output_variance" in self.metrics:
            self._outputs = _merge(self._outputs, outputs)
            self._updates = _merge(self._updates, updates)
        if "block_influence" in self.metrics:
            self._influence.append(torch.stack([row.cpu() for row in depth.completed(self._batch_influence, L)], -1))
        if "angular_distance" in self.metrics:
            found = depth.carried(self._states, L + 1)
            states = torch.stack([x.to(found[0].device) for x in found], -2)  # (S, L + 1, d) or (S, T, L + 1, d)
            self._distances.append(self._pair_distances(states).cpu())
        self.start(None, 0)

    def measures(self) -> ForwardMeasures:
        """The measures over all finished batches."""
        L = len(self.stack)
        return ForwardMeasures(
            torch.cat(self._distances) if self._distances else torch.empty(0, L + 1, L + 1, dtype=torch.float64),
            torch.cat(self._influence) if self._influence else torch.empty(0, L),
            self._outputs,
            self._updates,
            self._dtype,
            tuple(index for index in range(L) if index not in self._ran),
        )

    def _hook_of(self, index: int) -> Any:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            check_first_call(self.stack, index, self._called)
            x, y = (
                one_vector(state.detach(), self._samples, self._tokens, self._square)
                for state in (hidden_input(args, kwargs), hidden_output(output))
            )
            if x.dim() != 3 or len(x) != self._samples:
                raise ValueError(
                    f"model: expected hidden states (samples, tokens, width) of {self._samples} samples, "
                    f"got {tuple(x.shape)}"
                )
            if not self._batch_outputs:
                self._check_tokens(x)
                self._keep(x, index)
            self._keep(y, index + 1)
            self._ran.add(index)
            if "block_influence" in self.metrics:
                self._batch_influence[index] = depth.block_influence(x, y, self._mask_on(x))
            if "output_variance" in self.metrics:
                # At least float32, because the small update of a deep layer is lost in bfloat16.
                update = y.float() - x.float()
                self._batch_updates[index] = depth.moments(update, self._mask_on(x))

        return read

    def _check_tokens(self, x: Tensor) -> None:
        """Checks that padding and the first token can be told where the model adds or drops tokens inside."""
        if self._tokens in (None, x.shape[1]) or (self._mask is None and self.token != "first"):
            return
        what = "a batch with padding" if self._mask is not None else "token 'first'"
        raise ValueError(
            f"model: expected hidden states of the {self._tokens} tokens of a sample, got {x.shape[1]}: "
            f"{type(self.stack.model).__name__} adds or drops tokens inside, so {what} cannot be measured; use samples "
            "without padding and token 'last' or 'all'"
        )

    def _keep(self, x: Tensor, state: int) -> None:
        self._dtype = max(self._dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if "angular_distance" in self.metrics:
            self._states[state] = x if self.token == "all" else self._at_token(x)
        if "output_variance" in self.metrics:
            self._batch_outputs[state] = depth.moments(x, self._mask_on(x))
        else:  # a sum is enough to detect NaN and infinity
            self._batch_outputs[state] = torch.stack([depth.wide(x.sum(dtype=torch.float32))] * 4)

    def _mask_on(self, x: Tensor) -> Tensor | None:
        if self._mask is not None and self._mask.shape != x.shape[:2]:
            raise ValueError(f"attention_mask: expected {tuple(x.shape[:2])}, got {tuple(self._mask.shape)}")
        return None if self._mask is None else self._mask.to(x.device)

    def _at_token(self, x: Tensor) -> Tensor:
        """(S, d): the hidden state of each sample's last or first token that is not padding."""
        mask = self._mask_on(x)
        if mask is None:
            return x[:, -1 if self.token == "last" else 0].clone()
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)
        order = steps if self.token == "last" else steps.flip(0)
        return x[torch.arange(len(x), device=x.device), (mask * order).argmax(-1)]

    def _pair_distances(self, states: Tensor) -> Tensor:
        if self.token != "all":
            return depth.angular_distances(states)
        means = []
        for number, sample in enumerate(states):  # (T, L + 1, d)
            kept = sample if self._mask is None else sample[self._mask[number].to(sample.device)]
            chunks = [depth.angular_distances(chunk).sum(0) for chunk in kept.split(TOKEN_CHUNK)]
            means.append(torch.stack(chunks).sum(0) / len(kept))
        return torch.stack(means)

    def _check_finite(self, outputs: Tensor, number: int) -> None:
        broken = (~outputs[:, 1:3].isfinite().all(-1)).nonzero()
        if len(broken):
            raise NonFiniteError(int(broken[0]), number)


def _rows_on_cpu(rows: list[Tensor]) -> Tensor:
    return torch.stack([row.cpu().double() for row in rows]) if rows else torch.empty(0, 4, dtype=torch.float64)


def _merge(total: Tensor, new: Tensor) -> Tensor:
    return torch.cat([total[:, :3] + new[:, :3], torch.maximum(total[:, 3:], new[:, 3:])], -1)


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    count, total, squares, _ = sums.unbind(-1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)
