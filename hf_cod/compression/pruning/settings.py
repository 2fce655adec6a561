"""Settings of `prune`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.module_names import ModuleFields, ModuleSettings, Names, check_names
from hf_cod.io.settings import SampleFields, as_in, check_choice

# Method -> which weights are removed; `prune` has the formulas.
METHODS = {
    "magnitude": "smallest |W_ij| within the matrix (requires no dataset)",
    "wanda": "smallest |W_ij| ||X_j|| within a row",
    "sparsegpt": "smallest (W_ij / U_jj)^2 within 128 columns, with error compensation by the row's other weights",
}


@checked
@dataclass
class PruneSettings:
    """How the weights to set to zero are chosen."""

    method: str = field(
        default="wanda",
        metadata={
            "help": "which weights are set to zero. "
            + "; ".join(f"{name}: {zeros}" for name, zeros in METHODS.items()),
            "choices": list(METHODS),
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_names(self)


class PruneFields(ModuleFields, SampleFields, total=False):
    """Fields of `PruneSettings`, and of samples, that `prune` takes by name."""
