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
from hf_cod.layers.running import NonFiniteError
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers, unwrap
from hf_cod.layers.stock_four_bit import keep_unpacked

logger = logging.getLogger(__name__)

# What goes to dashboards of each layer; the history holds more.
LOGGED = ("gradient_norm", "variance", "angular_distance")
LOG_PREFIX = "depth/"


class LayerMonitor:
    """Measures each layer while a model trains, and never changes the training: but bitsandbytes' 4-bit weights on a
    CPU, which would give wrong gradients once an evaluation has repacked them, are kept from that.

    In a loop of one's own (under `accelerate`, inside `if accelerator.sync_gradients:`):

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

    A line of the history (see `TrainingHistory`) holds the norm of the step's real gradients and, of the model as the
    step left it, output variance, angular distance and effective depth on a fixed probe. The probe runs in eval mode
    without gradients, in the parameters' own dtype (not under autocast), eagerly even where the model is compiled,
    and with random numbers of its own. Call both methods on all processes: others than the first do only what a sharded
    model needs of them, replicas (DDP) nothing, shards (FSDP2) their part.

    Args:
        model: the model that trains, wrapped or not; after `accelerator.prepare`, where that shards it.
        probe: what it is measured on; see `hf_cod.analysis.monitoring.probe.probe_batches`.
        tokenizer: where the probe is text.
        history: file of the history; None keeps it in memory.
        step: the optimizer step that training starts at: after a resumed checkpoint its step, so that what the
            interrupted run measured later is dropped.
        last: the optimizer step that training ends at, which is measured in any case; None: not known.
        settings: when and on what it measures.
        **fields: or fields of `MonitorSettings` by name: every, sequence_length, max_samples, batch_size, pack, seed,
            logged_layers, layers_path.

    Raises:
        ValueError: bad settings, a probe that the model does not take, no layers found, a model in whose layers nothing
            can be read (FSDP1, DeepSpeed).
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
        keep_unpacked(model)  # or gradients would be wrong, those that train it, too
        with _own_randomness(model):  # a data loader draws a seed when it starts
            self.batches = probe_batches(probe, tokenizer, self.settings)
        if self.main and not self.sharded:  # shards want their first pass through the whole model
            self._try_probe()
        # Other processes keep their lines in memory: only the first one writes.
        self.history = TrainingHistory(self._header(), history if self.main else None)
        self.history.start(step)
        self._gradients: tuple[int, list[float | None]] | None = None
        self._told = False  # that there are no gradients

    def due(self, step: int) -> bool:
        """Whether this optimizer step, counted from 1, is measured."""
        return step in (1, self.last) or step % self.settings.every == 0

    def read_gradients(self, step: int, loss_scale: float = 1.0) -> None:
        """Reads the norms of the gradients that optimizer step `step` is about to apply, if it is measured.

        Call it when they are whole: after the last backward pass of an accumulation (and, under DDP, so after the
        all-reduce) and before clipping.

        Args:
            step: number of the optimizer step, counted from 1.
            loss_scale: what the gradients are still multiplied by: `GradScaler.get_scale()` before unscaling.
        """
        if self.due(step) and (self.main or self.sharded):
            norms = read_gradient_norms(self.stack)
            if not self._told and all(norm is None for norm in norms):
                self._told = True
                logger.warning(f"step {step}: no layer has a gradient to read; is it freed within the backward pass?")
            self._gradients = step, [None if norm is None else norm / loss_scale for norm in norms]

    def measure(self, step: int) -> dict[str, Any] | None:
        """Measures the model that step `step` left, if it is due, and records the line.

        Returns:
            The line of the history; None on other steps and on processes other than the first.
        """
        line = self.probe(step)
        return None if line is None else self.record(line)

    def probe(self, step: int) -> dict[str, Any] | None:
        """As `measure`, without recording the line: for those who have something to add to it."""
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
        """What is wrong with a layer since the last recorded line, and was not before, in words."""
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
        """Runs the first batch, so that a probe that does not fit is told before the training begins."""
        try:
            self._measure(self.batches[:1])
        except NonFiniteError:
            pass  # told at the first measured step, in the history
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"probe: expected batches that the model takes, got on its first one: {error}") from error

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
        if bool((steps <= measures.idle_below()).all()):  # what is left is rounding
            return found
        shares = {"effective_depth": depth.effective_depth(steps), "late_share": depth.late_share(steps)}
        return found | {name: float(share) for name, share in shares.items()}


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """The random numbers of the training go on afterwards as if nothing had drawn any inside."""
    device = execution_device(unwrap(model))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _eagerly() -> Any:
    """Compiled layers run eagerly: their code knows nothing of hooks and would be compiled again for eval mode."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _gathered(shards: Sequence[FSDPModule]) -> Iterator[None]:
    """Embeddings and norms outside the layers are whole inside; layers gather themselves when they are called."""
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
