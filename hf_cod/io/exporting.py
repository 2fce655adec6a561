"""Exportable: the method `export` of plans."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_cod.io.report import RunReport

# Imported by its name: a plan is in a room above that of the engines.
EXPORTER = "hf_cod.compression.export.exporter"


class Exportable:
    """Mixin for a plan of bits, which other engines can run."""

    def export(
        self, model: PreTrainedModel, output: str | Path, to: str = "compressed-tensors", **arguments: Any
    ) -> RunReport:
        """Writes the files by which another engine runs the model with the bits of this plan, as `hf-cod export`.

        Args:
            model: the model of the plan.
            output: a new or empty directory.
            to: the engine.
            **arguments: other arguments of `hf_cod.export`: batches, or tokenizer and texts, group_size, ...

        Raises:
            ValueError: a plan of other values than bits, of another model, or with a width that the engine lacks; and
                as `hf_cod.export`.
        """
        report: RunReport = import_module(EXPORTER).export(model, output, plan=self, to=to, **arguments)
        return report
