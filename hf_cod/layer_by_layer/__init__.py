"""Changing a model's layers one after another, each on what the changed layers before it hand on, or measuring them;
resumable."""

from hf_cod.layer_by_layer.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layer_by_layer.sequential import change_each, change_sequentially, measure_sequentially
from hf_cod.layer_by_layer.sums import Recorder, Sums

__all__ = [
    "FinishedLayers",
    "Recorder",
    "Sums",
    "change_each",
    "change_sequentially",
    "fingerprint_of_work",
    "measure_sequentially",
]
