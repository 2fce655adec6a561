"""Search for a plan of `fit`: knobs are measured alone, then the best combinations of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hf_cod.compression.fit.budget import Budget
from hf_cod.compression.fit.fit_plan import FitPlan
from hf_cod.compression.fit.knobs import FAILURES, KNOBS, describe_steps
from hf_cod.compression.fit.trials import Steps, Trial, Trials
from hf_cod.functional.combination import Combination, best_combinations, filled, rising
from hf_cod.io.journal import JournalError
from hf_cod.layers.running import progress

# How often the levels of a set of knobs are increased while its measured size is above the budget.
TIGHTENINGS = 4
NOT_COMBINED = (
    "no combination of methods was measured (n_verified is 0): the plan is the best single method that was measured"
)
# Points of the trade-off curve: remaining shares of the layers.
CURVE = tuple(share / 100 for share in range(95, 5, -5))


class Search:
    """The levels of knobs, their costs alone, and the measured combinations.

    Args:
        trials: measures combinations.
        budget: the budget to meet.
        levels: of each knob.
        named: whether the user named the knobs.
        notes: the first notes of the plan.
    """

    def __init__(
        self, trials: Trials, budget: Budget, levels: dict[str, list[float]], named: bool, notes: list[str]
    ) -> None:
        self._trials, self._budget, self._levels = trials, budget, levels
        self._named, self._notes = named, notes
        self._intact = trials.measure({})
        self._alone: dict[str, dict[int, Trial]] = {}
        self._saved: dict[str, list[float]] = {}
        self._costs: dict[str, list[float]] = {}
        self._tried: dict[str, tuple[float, Trial]] = {}
        self._least = budget.used(self._intact.size)

    def is_met_intact(self) -> bool:
        """Whether the intact model meets the budget; it is then the plan."""
        if not self._budget.is_met_by(self._intact.size):
            return False
        self._tried[""] = (self._intact.loss, self._intact)
        return True

    def measure_alone(self, show_progress: bool) -> None:
        """Fills the tables by which combinations are compared; step 0 of a knob means that it is not used."""
        wanted = {knob: _spread(len(levels), KNOBS[knob].tried) for knob, levels in self._levels.items()}
        todo = [(knob, step) for knob, steps in wanted.items() for step in steps]
        failed: dict[str, dict[int, str]] = {}
        for knob, step in progress(todo, "trying each step alone", show_progress):
            try:
                trial = self._trials.measure({knob: self._levels[knob][step - 1]})
            except JournalError:  # else the plan would depend on a file that is not ours
                raise
            except FAILURES as error:
                if self._named and step == wanted[knob][-1] and knob not in self._alone:
                    raise
                failed.setdefault(knob, {})[step] = str(error)  # the exception object would keep the model in memory
            else:
                self._alone.setdefault(knob, {})[step] = trial
                self._least = min(self._least, self._budget.used(trial.size))
        for knob, errors in failed.items():
            self._keep_what_works(knob, errors)
        if not self._alone:
            why = "; ".join(self._notes)
            raise ValueError(f"knobs: expected at least one that can be applied to the model, got none; {why}")
        for knob, found in self._alone.items():
            number = len(self._levels[knob]) + 1
            saved = {0: 0.0, **{step: 1 - self._budget.left(trial.size) for step, trial in found.items()}}
            costs = {0: 0.0, **{step: trial.loss - self._intact.loss for step, trial in found.items()}}
            # No interpolation between step 0, where the knob is not used, and its first level.
            first = min(found)
            assert first == 1
            self._saved[knob] = filled(saved, number)
            self._costs[knob] = filled(rising(costs), number)

    def _keep_what_works(self, knob: str, errors: dict[int, str]) -> None:
        """Restricts a knob to its first run of levels that work; excludes it if there are none."""
        found, levels = self._alone.get(knob, {}), self._levels[knob]
        if not found:
            self._notes.append(f"{knob} is left out: {errors[max(errors)]}")
            return
        first = min(found)
        end = min((step for step in errors if step > first), default=len(levels) + 1)
        works = {step - first + 1: trial for step, trial in found.items() if step < end}
        self._alone[knob], self._levels[knob] = works, levels[first - 1 : first - 1 + max(works)]
        # One note for all levels below those that work, and one for all above them, with the error of the nearest.
        below = max((step for step in errors if step < first), default=0)
        for step, rest in ((below, "less"), (end, "more")):
            if step in errors:
                self._notes.append(
                    f"{KNOBS[knob].describe(levels[step - 1])}, and {rest}, are left out: {errors[step]}"
                )

    def check_reach(self, combined: bool) -> None:
        """Raises an error if the knobs, together or each alone, do not meet the budget at their last levels."""
        least = {knob: 1 - saved[-1] for knob, saved in self._saved.items()}
        self._budget.check_reach(least, notes=self._notes, combined=combined)

    def verify(self, number: int, show_progress: bool) -> None:
        """Measures the best level of each knob alone, and the best combinations of several knobs."""
        singles = [(knob,) for knob in self._saved]
        sets = [tuple(c.steps) for c in self._best(self._saved, self._budget.most, number + len(singles))]
        several = [found for found in sets if len(found) > 1][:number]
        for used in progress([*singles, *several], "trying combinations", show_progress):
            self._meet(used)
            if len(used) == 1:
                self._add_measured(*used)
        if not number and len(singles) > 1:
            self._notes.append(NOT_COMBINED)

    def _add_measured(self, knob: str) -> None:
        """For a knob alone, considers also the levels that were measured before the combinations."""
        for step, trial in self._alone[knob].items():
            best = self._tried.get(knob)
            if self._budget.is_met_by(trial.size) and (best is None or trial.loss < best[1].loss):
                self._tried[knob] = (self._intact.loss + self._costs[knob][step], trial)
        if knob not in self._tried:
            self._notes.append(f"{knob} alone does not meet the budget")

    def _meet(self, used: tuple[str, ...]) -> None:
        """Measures the best combination of exactly these knobs; increases levels until its size is in the budget."""
        most = self._budget.most
        for _ in range(TIGHTENINGS):
            found = [c for c in self._best(used, most, 1 << len(used)) if set(c.steps) == set(used)]
            if not found:
                return
            try:
                trial = self._trials.measure(self._steps(found[0]))
            except JournalError:
                raise
            except FAILURES as error:
                self._notes.append(f"{describe_steps(self._steps(found[0]))}: {error}")
                return
            self._least = min(self._least, self._budget.used(trial.size))
            if self._budget.is_met_by(trial.size):
                self._tried[" ".join(used)] = (self._intact.loss + found[0].cost, trial)
                return
            most *= min(self._budget.most / self._budget.left(trial.size), 1) * (1 - 1e-3)

    def plan(self) -> FitPlan:
        """The measured combination with the least loss."""
        if not self._tried:
            budget = self._budget
            raise ValueError(
                f"{budget.kind}: expected a budget that a measured combination meets, of which the smallest has "
                f"{budget.told(self._least)}, got {budget.told(budget.value)}; a larger n_verified measures more"
            )
        best = min((trial for _, trial in self._tried.values()), key=lambda trial: trial.loss)
        curve = []
        for share in CURVE:
            for c in self._best(self._saved, share, 1):
                curve.append([share, self._intact.loss + c.cost, self._steps(c)])
        return FitPlan(
            kind=self._budget.kind,
            budget=self._budget.value,
            steps=best.steps,
            loss=best.loss,
            intact_loss=self._intact.loss,
            size=asdict(best.size),
            alone={knob: self._told(knob, found) for knob, found in self._alone.items()},
            tried=[
                {"steps": t.steps, "expected": expected, "loss": t.loss, "left": self._budget.left(t.size)}
                for expected, t in self._tried.values()
            ],
            curve=curve,
            notes=self._notes,
        )

    def _told(self, knob: str, found: dict[int, Trial]) -> dict[str, list[float]]:
        return {
            "levels": [self._levels[knob][step - 1] for step in found],
            "losses": [trial.loss for trial in found.values()],
            "left": [self._budget.left(trial.size) for trial in found.values()],
        }

    def _best(self, knobs: Any, most: float, number: int) -> list[Combination]:
        saved = {knob: self._saved[knob] for knob in knobs}
        costs = {knob: self._costs[knob] for knob in knobs}
        return best_combinations(saved, costs, most, self._budget.exclusive, number)

    def _steps(self, combination: Combination) -> Steps:
        return {knob: self._levels[knob][step - 1] for knob, step in combination.steps.items()}


def _spread(number: int, count: int) -> list[int]:
    """`count` of the steps 1 to `number`, evenly, both ends included."""
    if number <= count:
        return list(range(1, number + 1))
    return sorted({1 + round(i * (number - 1) / (count - 1)) for i in range(count)})
