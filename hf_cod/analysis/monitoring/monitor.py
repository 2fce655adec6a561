"""LayerMonitor: measures the layers of a model while it trains, in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from hf_cod.analysis.diagnostics.gradients import read_gradient_norms
from hf_cod.analysis.monitoring.health import find_trouble
from hf_cod.analysis.monitoring.history import TrainingHistory
from hf_cod.analysis.monitoring.probe import probe_batches
from hf_cod.analysis.monitoring.settings import MonitorFields, MonitorSettings
from hf_cod.functional import depth
from hf_cod.io.arguments import checked
from hf_cod.io.files import fingerprint
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batch, Tokenizer, describe_batches
from hf_cod.layers.checks import name_of
from hf_cod.layers.devices import execution_device
from hf_cod.layers.fingerprints import digest_batches
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import NonFiniteError
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers, unwrap
from hf_cod.layers.stock_four_bit import keep_unpacked

logger = logging.getLogger(__name__)

# Measures of each layer that are logged to trackers; the history holds more.
LOGGED = ("gradient_norm", "variance", "angular_distance")
LOG_PREFIX = "depth/"


class LayerMonitor:
    """Measures each layer during training without changing the training.

    One exception: the repacking of bitsandbytes' 4-bit weights on a CPU is disabled, because repacked weights give
    wrong gradients.

    In a custom training loop (with `accelerate`, inside `if accelerator.sync_gradients:`):

        monitor = LayerMonitor(model, texts, tokenizer=tokenizer, every=100, history="run/history.jsonl")
        for step, batch in enumerate(batches, start=1):
            loss = model(**batch).loss
            loss.backward()
            monitor.read_gradients(step)  # before clipping
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if line := monitor.measure(step):
                tracker.log(monitor.figures(line), step=step)

    A line of the history (see `TrainingHistory`) holds the norms of the step's gradients and, for the model after the
    step, output variance, angular distance and effective depth on a fixed probe. The probe runs in eval mode without
    gradients, in the parameters' own dtype (not under autocast), without compiled code, and with its own random
    numbers. Call both methods in all processes. In processes other than the first, replicas (DDP) do nothing, and
    shards (FSDP2) take part in the measurement.

    Args:
        model: the model in training, wrapped or not; after `accelerator.prepare`, if that shards it.
        probe: the data that it is measured on; see `hf_cod.analysis.monitoring.probe.probe_batches`.
        tokenizer: required if the probe is text.
        history: file of the history; None keeps it in memory.
        step: the optimizer step at which training starts: the step of the checkpoint when resuming, so that later lines
            of the interrupted run are removed.
        last: the optimizer step at which training ends, which is always measured; None: unknown.
        settings: settings of the measurements.
        **fields: or fields of `MonitorSettings` by name: every, sequence_length, max_samples, batch_size, pack, seed,
            logged_layers, layers_path.

    Raises:
        ValueError: bad settings, a probe that does not fit the model, no layers found, a model whose layers cannot be
            read (FSDP1, DeepSpeed).
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        probe: Any = None,
        *,
        tokenizer: Tokenizer = None,
        history: str | Path | None = None,
        step: int = 0,
        last: int | None = None,
        settings: MonitorSettings | None = None,
        **fields: Unpack[MonitorFields],
    ) -> None:
        self.settings, self.last = resolve(LayerMonitor, MonitorSettings, settings, fields), last
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("model: expected replicas (DDP) or shards of FSDP2, got FSDP1; set fsdp_version: 2")
        if any(type(module).__name__ == "DeepSpeedEngine" for module in model.modules()):
            raise ValueError("model: expected DDP or FSDP2, got DeepSpeed, whose gradients cannot be read")
        self.stack: DecoderLayers = find_decoder_layers(model, self.settings.layers_path)
        self.sharded = any(isinstance(p, DTensor) for p in self.stack.model.parameters())
        inside = {id(module) for layer in self.stack for module in layer.modules()}
        self._shards = [m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in inside]
        self.main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        config: Any = self.stack.config
        longest = getattr(config, "max_position_embeddings", None) or self.settings.sequence_length
        self.settings.sequence_length = min(self.settings.sequence_length, longest)
        keep_unpacked(model)  # otherwise all gradients would be wrong, also those of the training
        with _own_randomness(model):  # a data loader takes a random seed when it starts
            self.batches = probe_batches(probe, tokenizer, self.settings)
        check_inputs(self.stack.model, self.batches, "probe")
        if self.main and not self.sharded:  # FSDP2 requires that the first pass runs through the full model
            self._try_probe()
        # Other processes keep their lines in memory: only the first one writes.
        self.history = TrainingHistory(self._header(), history if self.main else None)
        self.history.start(step)
        self._gradients: tuple[int, list[float | None]] | None = None
        self._warned = False  # about missing gradients

    def due(self, step: int) -> bool:
        """Whether this optimizer step, counted from 1, is measured."""
        return step in (1, self.last) or step % self.settings.every == 0

    def read_gradients(self, step: int, loss_scale: float = 1.0) -> None:
        """Reads the norms of the gradients that optimizer step `step` will apply, if it is measured.

        Call it when gradients are complete: after the last backward pass of an accumulation (with DDP this is after the
        all-reduce) and before clipping.

        Args:
            step: number of the optimizer step, counted from 1.
            loss_scale: present factor of the gradients: `GradScaler.get_scale()` before unscaling.
        """
        if self.due(step) and (self.main or self.sharded):
            norms = read_gradient_norms(self.stack)
            if not self._warned and all(norm is None for norm in norms):
                self._warned = True
                logger.warning(f"step {step}: no layer has a gradient to read; is it freed within the backward pass?")
            self._gradients = step, [None if norm is None else norm / loss_scale for norm in norms]

    def measure(self, step: int) -> dict[str, Any] | None:
        """Measures the model after step `step`, if this step is due, and records the line.

        Returns:
            The line of the history; None at other steps and in processes other than the first.
        """
        line = self.probe(step)
        return None if line is None else self.record(line)

    def probe(self, step: int) -> dict[str, Any] | None:
        """As `measure`, without recording the line, so that the caller can add to it."""
        if not self.due(step) or not (self.main or self.sharded):
            return None
        read_at, norms = self._gradients or (step, None)
        line: dict[str, Any] = {"step": step, "gradient_norm": norms if read_at == step else None}
        line.update(self._forward())
        self._gradients = None
        return line if self.main else None

    def record(self, line: dict[str, Any]) -> dict[str, Any]:
        """Writes a line of `probe` into the history; returns it."""
        self.history.add(line)
        return self.history.lines[-1]

    def new_trouble(self) -> list[str]:
        """Sentences on trouble in the last recorded line that was not in the line before it."""
        lines = self.history.lines
        before = find_trouble(lines[:-1])
        return [text for key, text in find_trouble(lines).items() if key not in before]

    def figures(self, line: dict[str, Any]) -> dict[str, float]:
        """A line as flat numbers for a tracker, "depth/effective_depth" and "depth/variance/layer_07" for instance."""
        L = len(self.stack)
        digits = len(str(L - 1))
        found = {name: line.get(name) for name in ("effective_depth", "late_share")}
        for name in LOGGED:
            row = line.get(name) or [None] * L
            found.update({f"{name}/layer_{i:0{digits}d}": row[i] for i in self._logged()})
        return {LOG_PREFIX + name: value for name, value in found.items() if value is not None}

    def _logged(self) -> list[int]:
        L, count = len(self.stack), min(self.settings.logged_layers, len(self.stack))
        return [round(i * (L - 1) / max(1, count - 1)) for i in range(count)]

    def _header(self) -> dict[str, Any]:
        settings = {**asdict(self.settings), **describe_batches(self.batches)}
        probe = fingerprint(digest_batches(self.batches))
        return {"model": name_of(self.stack), "layers": len(self.stack), "settings": settings, "probe": probe}

    def _try_probe(self) -> None:
        """Runs the first batch, so that a probe that does not fit fails before the training starts."""
        try:
            self._measure(self.batches[:1])
        except NonFiniteError:
            pass  # recorded in the history at the first measured step
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"probe: expected batches that fit the model, got on the first one: {error}") from error

    def _measure(self, batches: Sequence[Batch]) -> Any:
        model = self.stack.model
        with _own_randomness(model), _eagerly(), _gathered(self._shards):
            return measure_forward(
                model, batches, ["angular_distance", "output_variance"], layers_path=self.stack.layers_path
            )

    def _forward(self) -> dict[str, Any]:
        try:
            measures = self._measure(self.batches)
        except NonFiniteError as error:
            return {"failure": str(error)}
        steps = depth.adjacent(measures.distances).mean(0)  # (L,)
        variance = measures.output_variance()
        found = {
            **{name: variance[name] for name in ("variance", "max_abs", "added_share")},
            "angular_distance": steps.tolist(),
        }
        if bool((steps <= measures.idle_below()).all()):  # only rounding errors
            return found
        shares = {"effective_depth": depth.effective_depth(steps), "late_share": depth.late_share(steps)}
        return found | {name: float(share) for name, share in shares.items()}


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """Restores the state of the training's random number generators at the end of the block."""
    device = execution_device(unwrap(model))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _eagerly() -> Any:
    """Runs compiled layers eagerly, because compiled code ignores hooks and would be compiled again for eval mode."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _gathered(shards: Sequence[FSDPModule]) -> Iterator[None]:
    """Gathers embeddings and norms outside the layers within the block; layers gather themselves when called."""
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
