"""LayerDiagnosticsCallback: a LayerMonitor for transformers' Trainer."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from hf_cod.analysis.monitoring.history import FILE_NAME
from hf_cod.analysis.monitoring.monitor import LayerMonitor
from hf_cod.analysis.monitoring.probe import check_probe
from hf_cod.analysis.monitoring.settings import CallbackFields, MonitorSettings
from hf_cod.io.arguments import checked
from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.settings import resolve

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import CallbackHandler, TrainerCallback

logger = logging.getLogger(__name__)

DIRECTORY = "layer_diagnostics"
# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
CLIP_EPSILON = 1e-6


class LayerDiagnosticsCallback(TrainerCallback):
    """Measures the layers of a model during training: `Trainer(..., callbacks=[LayerDiagnosticsCallback()])`.

    After the first optimizer step, after each `every` steps and after the last one it measures gradient norm, output
    variance, angular distance to the next layer, and the effective depth (see `LayerMonitor`). The results are written

    - to Trainer's log, and thus to the console, TensorBoard, W&B, trackio and `trainer_state.json`, as
      "depth/effective_depth", "depth/gradient_norm/layer_07", ...; measured steps are always logged, independent of
      `logging_strategy`, and the loss that Trainer logs there is the mean since the previous log;
    - to `history.jsonl`, one line per step, which `hf-cod history` plots; it is continued when training resumes from a
      checkpoint, so that an interrupted run has the same history as an uninterrupted one;
    - at the end of training to a report with plots.

    It never changes the training: weights are bit-equal with and without it.

    The gradient norm is that of the step's gradients: accumulated over its micro-batches, unscaled (fp16), averaged
    over processes (DDP, FSDP2), and *before* clipping. Trainer clips gradients before callbacks can read them, so
    clipping is undone with the norm that Trainer logs (`grad_norm`): g = g' / min(1, max_grad_norm / (norm + 1e-6)).
    The norm is None for a layer without gradients (frozen), and for all layers in a step that fp16 scaling skipped.

    Args:
        every: optimizer steps between measurements; default: 100.
        probe: the data that the model is measured on, see `probe_batches`: texts (with Trainer's
            `processing_class` as tokenizer), a dataset, or batches of tensors. None: an embedded novel.
        output_dir: directory of history, report and plots; default: layer_diagnostics in Trainer's `output_dir`.
        watch: action if a layer is dead or explodes (defined in `monitoring.health`): "warn" once, "stop" the training,
            or None.
        settings: settings of the measurements.
        **fields: or fields of `MonitorSettings` by name: sequence_length, max_samples, batch_size, pack, seed,
            logged_layers, layers_path.

    Raises:
        ValueError: bad settings; at the start of training: bad probe, no layers found, DeepSpeed or FSDP1.
    """

    @checked
    def __init__(
        self,
        every: int | None = None,
        probe: Any = None,
        output_dir: str | Path | None = None,
        *,
        watch: Literal["warn", "stop"] | None = "warn",
        settings: MonitorSettings | None = None,
        **fields: Unpack[CallbackFields],
    ) -> None:
        if watch not in ("warn", "stop", None):
            raise ValueError(f"watch: expected 'warn', 'stop' or None, got {watch!r}")
        # Errors are raised here, not at the start of training.
        self.settings = resolve(LayerDiagnosticsCallback, MonitorSettings, settings, fields, every=every)
        check_probe(probe)
        self.probe, self.output_dir, self.watch = probe, output_dir, watch
        self.monitor: LayerMonitor | None = None
        self._line: dict[str, Any] | None = None  # measured, not yet logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepares the probe, and continues the history from the step of the checkpoint."""
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise ValueError("model: expected DDP or FSDP2, got DeepSpeed, whose gradients cannot be read")
        self.directory = Path(self.output_dir or Path(args.output_dir) / DIRECTORY)
        self.monitor = LayerMonitor(
            kwargs["model"],
            self.probe,
            tokenizer=kwargs.get("processing_class"),
            history=self.directory / FILE_NAME,
            step=state.global_step,
            last=state.max_steps,
            settings=self.settings,
        )
        self.probe = self.monitor.batches  # an iterator would be exhausted in a second training
        self._line = None
        _call_first(self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the gradients after Trainer has accumulated, unscaled and clipped them."""
        assert self.monitor is not None
        self.monitor.read_gradients(state.global_step + 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records a measured line that Trainer did not log."""
        self._record(args, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the probe, and makes Trainer log this step."""
        assert self.monitor is not None
        if self.monitor.due(state.global_step):
            self._line = self.monitor.probe(state.global_step)
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the figures to Trainer's log, and undoes the clipping of gradients with its grad_norm."""
        if self.monitor is None or logs is None or "loss" not in logs or not self.monitor.due(state.global_step):
            return
        line = self._record(args, logs.get("grad_norm"))
        if line is not None:
            figures = self.monitor.figures(line)
            logs.update(figures)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)  # a copy of logs from before this call
        if self.watch is not None:
            self._watch(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the report and its plots."""
        assert self.monitor is not None
        self._record(args, None)
        if not self.monitor.main or not self.monitor.history.lines:
            return
        report = self.monitor.history.report()
        try:
            report.plot(self.directory)
        except Exception as error:  # a failed plot must never lose the trained model
            logger.warning(f"no plots were written to {self.directory}: {error}")
        report.save(self.directory)

    def _record(self, args: Any, total_norm: float | None) -> dict[str, Any] | None:
        """Completes the measured line and writes it, if there is one in this process."""
        line, self._line = self._line, None
        if line is None:
            return None
        assert self.monitor is not None
        return self.monitor.record(_before_clipping(line, total_norm, args.max_grad_norm))

    def _watch(self, control: Any) -> None:
        """Warns about new trouble, or stops the training in all processes together."""
        assert self.monitor is not None
        trouble = self.monitor.new_trouble()
        for sentence in trouble:
            logger.warning(sentence)
        if self.watch == "stop":
            found = [bool(trouble)]
            if torch.distributed.is_initialized():  # only the first process measures, but all must stop together
                torch.distributed.broadcast_object_list(found, src=0)
            control.should_training_stop = control.should_training_stop or found[0]


def _before_clipping(line: dict[str, Any], total_norm: float | None, max_norm: float | None) -> dict[str, Any]:
    """The line with gradient norms before Trainer clipped their total norm to `max_norm`.

    Args:
        line: result of `LayerMonitor.probe`, with gradients read after clipping.
        total_norm: norm of all gradients before clipping; None if Trainer did not log it.
        max_norm: Trainer's max_grad_norm; None or 0 for no clipping.
    """
    factor: float | None = 1.0
    if total_norm is not None and not math.isfinite(total_norm):
        factor = None  # gradients overflowed: this step is skipped
    elif max_norm:
        factor = None if total_norm is None else min(1.0, max_norm / (total_norm + CLIP_EPSILON))
    norms = line["gradient_norm"]
    if norms is not None:
        norms = [None if norm is None or factor is None else norm / factor for norm in norms]
    return {**line, "gradient_norm": norms, "clip_factor": factor}


def _call_first(callback: TrainerCallback) -> None:
    """Moves the callback to the front of Trainer's callbacks.

    Trainer calls trackers (TensorBoard, W&B, ...) before a user's callbacks and passes one dict of logs to all of them,
    so only the first callback can add to it for all. Callbacks get no reference to their list, so it is found on the
    call stack. If that fails, the figures still reach the console and the history.
    """
    frame = sys._getframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # Trainer is iterating over this list: moving an item that it has passed skips and repeats nothing.
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]
