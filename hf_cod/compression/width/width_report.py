"""The report of `narrow`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_cod.compression.width.experts import lacks_bias
from hf_cod.compression.width.width_plan import WidthPlan
from hf_cod.io.report import RunReport
from hf_cod.layers.checks import name_of, pruned_matrices, sizes_of
from hf_cod.layers.devices import environment_of
from hf_cod.layers.expert_units import ALIGNED, ExpertUnits
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.module_choice import in_layers
from hf_cod.layers.size import count_parameters
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import EXPERTS, KINDS, LayerUnits

STOCK = "The result is a stock model: transformers loads it without this package."
NOT_STOCK = (
    "The config of its family cannot describe its layers: loading requires hf_cod to be imported, or "
    "trust_remote_code=True."
)


class WidthReporter:
    """Records the sizes of a model before it is narrowed, and makes the report afterwards.

    Args:
        stack: the layers.
        units: of each layer.
        name: the model's name, or None.
        notes: for the report.
    """

    def __init__(
        self, stack: DecoderLayers, units: Sequence[LayerUnits], name: str | None, notes: Sequence[str] = ()
    ) -> None:
        self.stack, self.units, self.notes = stack, units, [*notes]
        self.name = name or name_of(stack)
        self.sizes = sizes_of(stack)
        self.parameters = count_parameters(stack.model)
        self.pruned = len(pruned_matrices(stack))

    def report(
        self,
        plan: WidthPlan,
        kept: Sequence[dict[str, int]],
        finished: FinishedLayers,
        settings: dict[str, Any],
        stock: bool,
    ) -> RunReport:
        """Counts the remaining weights, and makes the report."""
        left = sizes_of(self.stack)
        share = sum(left) / sum(self.sizes)
        notes = [finished.notes[index] for index in range(len(self.stack))]
        unseen = [matrix for note in notes for matrix in note["unseen"]]
        return RunReport(
            kind="narrow",
            model=self.name,
            settings=settings,
            environment=environment_of(self.stack.model),
            layers=self._layers(kept, left, [note["errors"] for note in notes]),
            results={
                "parameter_share": share,
                "parameters": {"intact": self.parameters, "narrowed": count_parameters(self.stack.model)},
                "heads": plan.heads,
                "channels": plan.channels,
                **({} if plan.expert_channels is None else {"expert_channels": plan.expert_channels}),
                "stock": stock,
            },
            summary=[
                f"{share:.2%} of {sum(self.sizes):,} weights in the layers' matrices are kept; the budget was "
                f"{plan.budget:.2%}.",
                STOCK if stock else NOT_STOCK,
            ],
            notes=[
                *self.notes,
                *_told_whole(self.units),
                *self._told_of_experts(plan, kept, settings["compensation"]),
                *(
                    f"no token entered {matrix}: narrowed by magnitude, without compensation"
                    for matrix in _told(unseen)
                ),
                *self._filled(),
            ],
        )

    def _layers(
        self, kept: Sequence[dict[str, int]], left: Sequence[int], errors: Sequence[Sequence[float]]
    ) -> dict[str, list[Any]]:
        """One value for each layer; measures that no layer has are omitted."""
        found: dict[str, list[Any]] = {
            f"share_of_{kind}": [_share(own, kind, less) for own, less in zip(self.units, kept, strict=True)]
            for kind in KINDS
        }
        found["error"] = [sum(each) / len(each) if each else None for each in errors]
        return {
            "parameter_share": [after / before for after, before in zip(left, self.sizes, strict=True)],
            **{name: values for name, values in found.items() if any(value is not None for value in values)},
            "parameters": self.sizes,
        }

    def _told_of_experts(self, plan: WidthPlan, kept: Sequence[dict[str, int]], compensation: str) -> list[str]:
        """Notes on experts whose number of channels is rounded to all of them, and on those without compensation."""
        rounded, uncompensated = [], []
        planned = plan.expert_channels or [None] * len(kept)
        for index, (layer, less, number) in enumerate(zip(self.units, kept, planned, strict=True)):
            own = layer[EXPERTS]
            if isinstance(own, ExpertUnits) and EXPERTS not in less and number is not None:
                rounded.append(index)
            elif isinstance(own, ExpertUnits) and EXPERTS in less and compensation == "bias" and lacks_bias(own):
                uncompensated.append(index)
        whole = f"experts keep all channels, whose number is rounded to a multiple of {ALIGNED} or more"
        missing = "banks of experts have no biases: their compensation is none instead of bias"
        return [f"{in_layers(found)}: {why}" for found, why in ((rounded, whole), (uncompensated, missing)) if found]

    def _filled(self) -> list[str]:
        """A note if pruned matrices have lost their zeros."""
        filled = self.pruned - len(pruned_matrices(self.stack)) if self.pruned else 0
        if not filled:
            return []
        return [
            f"{filled} of {self.pruned} pruned matrices have lost their zeros: least_squares fits all kept weights of "
            "a matrix again; narrow before pruning, or use compensation none or bias"
        ]


def _told(unseen: Sequence[str]) -> list[str]:
    """Names of matrices; one for all experts of a bank."""
    experts = Counter(name.rpartition(".")[0] for name in unseen if name.rpartition(".")[2].isdecimal())
    whole = [name for name in unseen if not name.rpartition(".")[2].isdecimal()]
    return [*whole, *(f"{count} expert{'s' if count > 1 else ''} of {name}" for name, count in experts.items())]


def _told_whole(units: Sequence[LayerUnits]) -> list[str]:
    """One note for all layers with the same reason why heads or channels are left unchanged."""
    layers: dict[str, list[int]] = {}
    for index, layer in enumerate(units):
        for reason in layer.whole:
            layers.setdefault(reason, []).append(index)
    return [f"{in_layers(found)}: {reason}" for reason, found in layers.items()]


def _share(units: LayerUnits, kind: str, kept: dict[str, int]) -> float | None:
    own = units[kind]
    return None if own is None else kept.get(kind, own.count) / own.count
