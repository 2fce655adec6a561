"""Step: the part of a compressing command that differs from the common pipeline in `compression.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cod.io.module_names import without_unset

if TYPE_CHECKING:
    from hf_cod.cli.work import Work
    from hf_cod.io.report import RunReport
    from hf_cod.layers.memory_limit import Copies
    from hf_cod.scoring.layer_scores import LayerScores


# Name of a baseline in reports -> what it applies.
BASELINES = {
    "uniform": "the same value for all layers",
    "three": "3 bits for all layers",
    "four": "4 bits for all layers",
}


class Step(ABC):
    """Planning and applying of one compression method; the pipeline does everything else.

    Args:
        settings: settings of the command, including `MeasuringSettings`.

    Attributes:
        command: name of the command.
        done: state of the model after the step, such as "pruned": the key next to "intact" in a report's results.
    """

    command: ClassVar[str]
    done: ClassVar[str]
    # Setting -> its name in an earlier version, by which runs of both versions have the same identity.
    earlier: ClassVar[dict[str, str]] = {}
    # Name of the baseline that replaces a plan with a higher perplexity, unless `settings.force` is set.
    rival: ClassVar[str] = "uniform"

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def samples(self) -> Any:
        """Settings of samples: `max_samples` for calibration, `eval_samples` for evaluation."""
        return self.settings

    def check(self, work: Work) -> None:  # noqa: B027 - most have nothing to check
        """Checks, before anything is measured, that the step can be applied to the model.

        Raises:
            ValueError: it cannot; gives the reason.
        """

    def identity(self) -> Any:
        """JSON-like identity of a run among runs of the same command on the same model and text."""
        return self.earlier_names(self.settings)

    def earlier_names(self, settings: Any) -> dict[str, Any]:
        """Settings by the names that an earlier version gave them, without those that it did not have."""
        given = without_unset(asdict(settings))
        if given.get("granularity") == "layer":
            del given["granularity"]
        if "search_passes" in given and not given["search"]:
            del given["search"], given["search_passes"]
        return {self.earlier.get(name, name): value for name, value in given.items()}

    def copies(self) -> Copies:
        """What the change of one matrix takes in memory beside its weights, at most."""
        from hf_cod.layers.memory_limit import Copies

        return Copies(0)

    def in_memory(self) -> str | None:
        """The option because of which the step requires weights in memory; None if they may stay in files."""
        return "search" if getattr(self.settings, "search", False) else None

    def disk_share(self) -> float:
        """Minimum size of the results as a share of the model's bytes; checked against free disk space at the start."""
        return 0.1

    @abstractmethod
    def plan(self, work: Work) -> Any:
        """Makes the plan from the intact model; None if nothing is to be applied."""

    def baselines(self, work: Work, plan: Any) -> dict[str, Any]:
        """Name, of those in `BASELINES`, -> alternative plan, whose perplexity is measured for comparison.

        `rival` is the same for all layers. It is applied instead of the plan if its perplexity is lower, unless
        `settings.force` is set.
        """
        return {}

    def further_scores(self) -> dict[str, str]:
        """What else than layers a plan scores -> the score, as "experts"."""
        return {}

    @abstractmethod
    def apply(self, work: Work, plan: Any) -> RunReport:
        """Applies a plan to `work.model` in place; returns the report of the function that did."""

    @property
    def trained(self) -> str | None:
        """State of the model after training, as a key of results; None if training is not requested."""
        return None

    def train(self, work: Work) -> None:  # noqa: B027 - most train nothing
        """Trains the compressed model, if requested."""

    def files(self, plan: Any) -> dict[str, Any]:
        """File name -> record to save under this name next to the model."""
        return {}

    def measure(self, saved: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Further measurements of the saved model: entries for a report's `layers`, and for its `results`."""
        return {}, {}

    def told(self, plan: Any) -> dict[str, Any]:
        """Entries of the report's settings in addition to those of the command."""
        return {}

    def sentences(self, report: RunReport, saved: Any) -> list[str]:
        """Sentences of this step for the summary, by default those of its report; `saved` is the saved model."""
        return report.summary

    def last_words(self) -> list[str]:
        """Sentences on loading the model, printed last."""
        return []


def uniform_baseline(plan: Any, settings: Any, scores: LayerScores | None) -> dict[str, Any]:
    """For `Step.baselines`: the plan that `settings.allocate` makes of equal scores, as "uniform".

    Empty without `settings.baseline`, and if the plan is uniform.

    Args:
        plan: the plan to compare with.
        settings: settings of the command, `SpreadSettings`.
        scores: scores of the model's layers, of which the sizes are used; None if the plan does not depend on scores.
    """
    if not settings.baseline or scores is None or plan.method == "uniform":
        return {}
    alike = replace(scores, values=[1.0] * len(scores.values), method="uniform", granularity="layer", parts=[])
    return {"uniform": settings.allocate(alike)}
