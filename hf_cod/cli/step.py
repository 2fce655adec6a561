"""Step: what one compressing command adds to the pipeline of `compression.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport


class Step(ABC):
    """What is decided and done to a model; all else is the pipeline's.

    Args:
        settings: the command's, with `MeasuringSettings` among them.

    Attributes:
        command: its name.
        done: what the model is afterwards, such as "pruned": the key beside "intact" in a report's results.
    """

    command: ClassVar[str]
    done: ClassVar[str]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def samples(self) -> Any:
        """How samples are cut: `max_samples` of them to work on, `eval_samples` to measure on."""
        return self.settings

    def check(self, work: Work) -> None:  # noqa: B027 - most have nothing to check
        """Fails, before anything is measured, where the model cannot be treated.

        Raises:
            ValueError: says why.
        """

    def identity(self) -> Any:
        """What tells a run from others of the same command on the same model and text, JSON-like."""
        return asdict(self.settings)

    def disk_share(self) -> float:
        """What is written is at least this share of the model's bytes: so much must be free before the work begins."""
        return 0.1

    @abstractmethod
    def plan(self, work: Work) -> Any:
        """Decides on the intact model what is done to it; None where nothing is to be done."""

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """Name -> another plan, whose perplexity is measured for comparison; "uniform" treats all layers alike, and is
        what is done instead where a score does harm, unless `settings.force` says otherwise.
        """
        return {}

    @abstractmethod
    def apply(self, work: Work, plan: Any) -> RunReport:
        """Changes `work.model` in place by a plan; returns the report of the function that did."""

    @property
    def trained(self) -> str | None:
        """What the model is once it was trained on; None where that was not asked for."""
        return None

    def train(self, work: Work) -> None:  # noqa: B027 - most train nothing
        """Trains the changed model on, where that was asked for."""

    def files(self, plan: Any) -> dict[str, Any]:
        """File name -> record that saves itself there, beside the model."""
        return {}

    def measure(self, saved: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """What else is counted in the saved model: of a report's `layers`, and of its `results`."""
        return {}, {}

    def told(self, plan: Any) -> dict[str, Any]:
        """What the report's settings say beside the command's own."""
        return {}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """Findings of this step: the function's own, or others in their place; `saved` is the model that was saved."""
        return report.summary

    def last_words(self) -> list[str]:
        """What a user must know to load the model: printed last."""
        return []
