"""Measures from one forward pass per batch: angular distance of all layer pairs, block influence, output variance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.forward_measures import ForwardMeasures
from hf_cod.analysis.diagnostics.settings import FORWARD_METRICS, Token
from hf_cod.functional import depth
from hf_cod.io.deprecation import renamed
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.direct_use import has_tokens_first
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import (
    NonFiniteError,
    evaluation_mode,
    one_vector,
    progress,
)
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.streams import check_states, states_around
from hf_cod.layers.task import model_inputs

# With token "all", pair matrices of this number of tokens are in memory at a time, (L + 1)^2 numbers each.
TOKEN_CHUNK = 64


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
    residual streams (mHC, AltUp, Reformer), x^l are those of a token as one vector. Tokens that a model adds inside,
    such as prompts, count like inputs; then padding and token "first" are refused. Padding by the model does not count.
    Layers of a vision tower that read the patches of all images without a sample axis (Qwen2.5-VL, Pixtral) have one
    sample for each batch, and layers that read several tiles of an image one for each tile.

    A layer that runs several times in a forward pass (loops over depth) is measured at each run, and its figures are
    means over its runs. Distances over n layers are within one run through the list, which ends where a layer runs
    again; NaN where no run has these layers.

    Args:
        model: a transformers model, wrapped or not, in any dtype; also offloaded by accelerate.
        batches: dicts for the model's forward; attention_mask (S, T) marks padding on either side.
        metrics: some of `FORWARD_METRICS`.
        token: token at which angles are measured: the last or first that is not padding, or the mean over all of them.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Raises:
        NonFiniteError: NaN or infinite activations (says in which layer first).
        ValueError: no layers found; a model without weights; one whose layers return something else than their hidden
            state.
    """
    if token not in ("last", "first", "all"):
        raise ValueError(f"token: expected 'last', 'first' or 'all', got {token!r}")
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    recorder = ForwardRecorder(stack, metrics, token)
    device = execution_device(stack.model)
    with torch.no_grad(), evaluation_mode(stack), recorder.attached():
        for number, batch in enumerate(progress(batches, "forward pass", show_progress)):
            inputs = model_inputs(stack.model, to_device(batch, device))
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
        # One for each run.
        self._outputs = [torch.zeros(len(stack) + 1, 4, dtype=torch.float64)]
        self._updates = [torch.zeros(len(stack), 4, dtype=torch.float64)]
        self._dtype = torch.float32
        self._mask: Tensor | None = None
        self._runs: Counter[int] = Counter()
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
        self._called: set[int] = set()  # in this run through the list
        self._states: dict[int, Tensor] = {}
        # Of each run that has ended: its layers, and the distances between its states.
        self._ended: list[tuple[set[int], Tensor]] = []
        # By number of the layer, or of the state; for each of its runs.
        self._calls: Counter[int] = Counter()
        self._batch_influence: dict[int, Tensor] = {}
        self._batch_outputs: list[dict[int, Tensor]] = []
        self._batch_updates: list[dict[int, Tensor]] = []

    def finish(self, number: int) -> None:
        """Ends a batch: checks it and adds it to the sums."""
        L = len(self.stack)
        if not self._calls:
            raise ValueError(self.stack.not_run(f"others as batch {number}"))
        self._end_run()
        outputs = [_rows_on_cpu(depth.carried(self._batch_outputs[0], L + 1))]
        updates = [_rows_on_cpu(depth.completed(first, L, counted=True)) for first in self._batch_updates[:1]]
        outputs += [_rows_of_runs(found, L + 1) for found in self._batch_outputs[1:]]
        updates += [_rows_of_runs(found, L) for found in self._batch_updates[1:]]
        for rows in outputs:
            self._check_finite(rows, number)
        if "output_variance" in self.metrics:
            self._outputs = _merge(self._outputs, outputs)
            self._updates = _merge(self._updates, updates)
        if "block_influence" in self.metrics:
            means = {index: total / self._calls[index] for index, total in self._batch_influence.items()}
            self._influence.append(torch.stack([row.cpu() for row in depth.completed(means, L)], -1))
        if "angular_distance" in self.metrics:
            self._distances.append(depth.over_runs(self._ended, L))
        self._runs |= self._calls  # the larger number of each
        self.start(None, 0)

    def measures(self) -> ForwardMeasures:
        """The measures over all finished batches."""
        L = len(self.stack)
        return ForwardMeasures(
            torch.cat(self._distances) if self._distances else torch.empty(0, L + 1, L + 1, dtype=torch.float64),
            torch.cat(self._influence) if self._influence else torch.empty(0, L),
            torch.stack(self._outputs),
            torch.stack(self._updates),
            self._dtype,
            tuple(index for index in range(L) if index not in self._runs),
            tuple(self._runs[index] for index in range(L)),
        )

    def _hook_of(self, index: int) -> Any:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if index in self._called:
                self._end_run()
            x, y = (
                one_vector(state.detach(), self._samples, self._tokens, self._square)
                for state in states_around(module, args, kwargs, output)
            )
            check_states(self.stack, index, x, y, self._samples, self._tokens)
            run = self._calls[index]
            if not self._calls:
                self._find_padding(x, kwargs)
                self._check_tokens(x)
            if not self._called:
                self._keep_state(x, index)
                if index == 0 or not self._calls:
                    self._count(x, index, run)
            self._keep_state(y, index + 1)
            self._count(y, index + 1, run)
            self._called.add(index)
            self._calls[index] += 1
            if "block_influence" in self.metrics:
                influence = depth.block_influence(x, y, self._mask_on(x))
                self._batch_influence[index] = self._batch_influence[index] + influence if run else influence
            if "output_variance" in self.metrics:
                # At least float32, because the small update of a deep layer is lost in bfloat16.
                update = y.float() - x.float()
                _of_run(self._batch_updates, run)[index] = depth.moments(update, self._mask_on(x))

        return read

    def _end_run(self) -> None:
        """Ends a run through the list of layers; of its states their distances are kept."""
        if "angular_distance" in self.metrics:
            found = depth.carried(self._states, len(self.stack) + 1)
            states = torch.stack([x.to(found[0].device) for x in found], -2)  # (S, L + 1, d) or (S, T, L + 1, d)
            self._ended.append((self._called, self._pair_distances(states).cpu()))
        self._called, self._states = set(), {}

    def _find_padding(self, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Takes the mask of the layers in place of that of the inputs, where the model itself pads its inputs."""
        mask = kwargs.get("attention_mask")
        if self._tokens in (None, x.shape[1]) or not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
            return
        if int(mask.bool().sum(-1).max()) <= self._tokens:
            self._mask, self._tokens = mask.bool(), x.shape[1]

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

    def _keep_state(self, x: Tensor, state: int) -> None:
        self._dtype = max(self._dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if "angular_distance" in self.metrics:
            self._states[state] = x if self.token == "all" else self._at_token(x)

    def _count(self, x: Tensor, state: int, run: int) -> None:
        rows = _of_run(self._batch_outputs, run)
        if "output_variance" in self.metrics:
            rows[state] = depth.moments(x, self._mask_on(x))
        else:  # a sum is enough to detect NaN and infinity
            rows[state] = torch.stack([depth.wide(x.sum(dtype=torch.float32))] * 4)

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


def _rows_of_runs(found: dict[int, Tensor], count: int) -> Tensor:
    """The rows of a later run, which are zero for the layers that do not have it."""
    rows = torch.zeros(count, 4, dtype=torch.float64)
    for index, row in found.items():
        rows[index] = row.cpu()
    return rows


def _of_run(runs: list[dict[int, Tensor]], run: int) -> dict[int, Tensor]:
    runs.extend({} for _ in range(run + 1 - len(runs)))
    return runs[run]


def _merge(totals: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Adds the rows of a batch; batches may differ in the number of runs."""
    pairs = zip_longest(totals, new, fillvalue=torch.zeros(1, 4, dtype=torch.float64))
    return [torch.cat([a[:, :3] + b[:, :3], torch.maximum(a[:, 3:], b[:, 3:])], -1) for a, b in pairs]
