"""What each layer does: one forward pass, a sweep of removals, one backward pass; `diagnose` runs them all."""

from hf_cod.diagnostics.diagnosis import DiagnoseSettings, MeasurementError, diagnose
from hf_cod.diagnostics.forward_pass import ForwardMeasures, measure_forward
from hf_cod.diagnostics.gradients import measure_gradient_norm, read_gradient_norms
from hf_cod.diagnostics.layer_drop import measure_layer_drop
from hf_cod.diagnostics.running import NonFiniteError

__all__ = [
    "DiagnoseSettings",
    "ForwardMeasures",
    "MeasurementError",
    "NonFiniteError",
    "diagnose",
    "measure_forward",
    "measure_gradient_norm",
    "measure_layer_drop",
    "read_gradient_norms",
]
