"""Settings of `LayerMonitor` and `LayerDiagnosticsCallback`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, SampleSettings, check_least, layers_path_field


@checked
@dataclass
class MonitorSettings(SampleSettings):
    """Steps and samples at which layers are measured during training."""

    sequence_length: int = field(
        default=128, metadata={"help": "tokens per sample of the probe; reduced to the model's maximum positions"}
    )
    max_samples: int = field(default=16, metadata={"help": "samples of the probe, if it is text or a dataset"})
    every: int = field(
        default=100, metadata={"help": "optimizer steps between measurements; the first step is always measured"}
    )
    logged_layers: int = field(
        default=12,
        metadata={"help": "number of layers in the log, evenly spaced from first to last; the history holds all"},
    )
    layers_path: str | None = layers_path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, every=1, logged_layers=0)


class CallbackFields(SampleFields, total=False):
    """Fields of `MonitorSettings` that `LayerDiagnosticsCallback` takes by name."""

    logged_layers: int
    layers_path: str | None


class MonitorFields(CallbackFields, total=False):
    """Fields of `MonitorSettings` that `LayerMonitor` takes by name."""

    every: int
