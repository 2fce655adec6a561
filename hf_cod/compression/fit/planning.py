"""`plan_fit`: the combination of steps with the least measured loss within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.fit.budget import Budget, check_budget
from hf_cod.compression.fit.fit_plan import FitPlan
from hf_cod.compression.fit.knobs import EXCLUSIVE, FAILURES, KNOBS, chosen_knobs, describe_steps, left_out
from hf_cod.compression.fit.settings import FitFields, FitSettings
from hf_cod.compression.fit.trials import Steps, Trial, Trials
from hf_cod.functional.combination import Combination, best_combinations, filled, rising
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import current_value, renamed
from hf_cod.io.files import fingerprint
from hf_cod.io.settings import resolve
from hf_cod.io.text import Batches, check_batches
from hf_cod.layers.fingerprints import Journals, digest_batches
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import progress
from hf_cod.layers.size import size_of
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.settings import OLD_KINDS

# How far below what its knobs promise a model may come out, as a share: whole ranks, heads and channels are rounded.
ROUNDING = 0.95
# How often a choice of knobs is tightened where its measured size is above the budget.
TIGHTENINGS = 4
# Points of the trade-off curve: shares of the layers that are left.
CURVE = tuple(share / 100 for share in range(95, 5, -5))


@renamed(path="layers_path")
@checked
def plan_fit(
    make: Callable[[], nn.Module],
    kind: str,
    budget: float,
    calibration: Batches,
    tuning: Batches,
    *,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: FitSettings | None = None,
    **fields: Unpack[FitFields],
) -> FitPlan:
    """Finds how to make a model meet a budget.

    1. Each knob is tried alone at a few levels: what it costs (nats a token on `tuning`) and what it leaves.
    2. Costs are taken to add up, savings to multiply; under that assumption all combinations of levels are compared.
    3. The best choice of each knob alone, and of the `verify` best sets of knobs, are applied and measured as a whole,
       because the assumption is one. What misses the budget when it is measured is tightened. The best of them stays.

    So the plan is never worse, on `tuning`, than any single method at the levels of it that were measured and meet the
    budget; a method that does not meet it alone is named in the notes.

    Of a model that meets the budget as it is nothing is tried, and the plan has no steps.

    Args:
        make: gives a fresh copy of the intact model at each call (a function that loads it); one at a time is alive.
        kind: "memory" (bytes of the whole model), "parameter_share" (of the weights of the layers' matrices, 0 to 1)
            or "bits" (stored bits for each of those weights).
        budget: the most that is allowed, in that unit.
        calibration: dicts for the model's forward, which methods calibrate on.
        tuning: other ones, which losses are measured on.
        journal: a directory: what was measured is kept there, and the same call goes on where it stopped.
        layers_path: the stack's module name where it cannot be found.
        show_progress: show a progress bar.
        settings: what to choose from, and how well it is checked.
        **fields: or fields of `FitSettings` by name: `knobs`, names of `KNOBS` to choose from (default: all that can
            help, of which those that this model cannot do are left out; levels at which a method fails are left out in
            either case; the plan's notes tell what was), and `verify`, how many sets of knobs are measured as a whole,
            beside each knob alone.

    Raises:
        ValueError: an unknown kind or knob; a budget that is none, or out of reach, which says the least possible,
            before anything is measured (where knobs fail on the way, or rounding decides, once they are measured
            alone); a named knob that the model cannot do, before anything is measured where the model shows it.
        ImportError: a named knob needs a package that is not installed; before anything is measured.
    """
    how = resolve(plan_fit, FitSettings, settings, fields)
    knobs, kind = how.knobs, current_value("kind", kind, OLD_KINDS, above=2)
    check_budget(kind, budget)
    if isinstance(make, nn.Module):
        raise ValueError(f"make: expected a function that loads the model, got a model ({type(make).__name__})")
    for name, batches in (("calibration", calibration), ("tuning", tuning)):
        if not batches:
            raise ValueError(f"{name}: expected at least one batch, got none")
        check_batches(batches)
    chosen = chosen_knobs(knobs, kind)
    intact = make()
    stack = find_decoder_layers(intact, layers_path)
    for name, batches in (("calibration", calibration), ("tuning", tuning)):
        check_inputs(stack.model, batches, name)
    notes = left_out(chosen, stack, knobs is not None)
    levels = {knob: KNOBS[knob].levels(intact, layers_path) for knob in chosen if knob not in notes}
    target = Budget(kind, budget, size_of(intact, layers_path))
    if levels:
        least = {knob: KNOBS[knob].left(stack, found[-1]) for knob, found in levels.items()}
        target.check_reach(least, ROUNDING, list(notes.values()))
    work = fingerprint(Journals(journal or "", intact, calibration).inputs, digest_batches(tuning))
    del intact, stack
    trials = Trials(make, calibration, tuning, journal, work, layers_path)
    search = _Search(trials, target, levels, knobs is not None, list(notes.values()))
    if search.is_met_intact():
        return search.plan()
    search.measure_alone(show_progress)
    search.check_reach()
    search.verify(how.verify, show_progress)
    return search.plan()


class _Search:
    """Levels, what they cost alone, and what was measured together.

    Args:
        trials: measure.
        budget: what is to be met.
        levels: of each knob.
        named: whether somebody asked for these knobs.
        notes: begins with these.
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

    def is_met_intact(self) -> bool:
        """Whether the model meets the budget as it is, so that nothing is to be found."""
        if self._budget.most < 1:
            return False
        self._tried[""] = (self._intact.loss, self._intact)
        return True

    def measure_alone(self, show_progress: bool) -> None:
        """Fills the tables that combinations are compared by; step 0 of a knob is not to use it."""
        wanted = {knob: _spread(len(levels), KNOBS[knob].tried) for knob, levels in self._levels.items()}
        todo = [(knob, step) for knob, steps in wanted.items() for step in steps]
        failed: dict[str, dict[int, str]] = {}
        for knob, step in progress(todo, "trying each step alone", show_progress):
            try:
                trial = self._trials.measure({knob: self._levels[knob][step - 1]})
            except FAILURES as error:
                if self._named and step == wanted[knob][-1] and knob not in self._alone:
                    raise
                failed.setdefault(knob, {})[step] = str(error)  # the error itself would keep the model in memory
            else:
                self._alone.setdefault(knob, {})[step] = trial
        for knob, errors in failed.items():
            self._keep_what_works(knob, errors)
        if not self._alone:
            raise ValueError(f"knobs: expected at least one that the model can do, got none; {'; '.join(self._notes)}")
        for knob, found in self._alone.items():
            number = len(self._levels[knob]) + 1
            saved = {0: 0.0, **{step: 1 - self._budget.left(trial.size) for step, trial in found.items()}}
            costs = {0: 0.0, **{step: trial.loss - self._intact.loss for step, trial in found.items()}}
            # Not to use a knob is no step on the way to its first level: nothing is interpolated there.
            first = min(found)
            assert first == 1
            self._saved[knob] = filled(saved, number)
            self._costs[knob] = filled(rising(costs), number)

    def _keep_what_works(self, knob: str, errors: dict[int, str]) -> None:
        """Cuts a knob's levels to the first ones in a row at which it works; leaves it out where there are none."""
        found, levels = self._alone.get(knob, {}), self._levels[knob]
        if not found:
            self._notes.append(f"{knob} is left out: {errors[max(errors)]}")
            return
        first = min(found)
        end = min((step for step in errors if step > first), default=len(levels) + 1)
        works = {step - first + 1: trial for step, trial in found.items() if step < end}
        self._alone[knob], self._levels[knob] = works, levels[first - 1 : first - 1 + max(works)]
        # One note for all below what works, and one for all above it: the nearest tells why.
        below = max((step for step in errors if step < first), default=0)
        for step, rest in ((below, "less"), (end, "more")):
            if step in errors:
                self._notes.append(
                    f"{KNOBS[knob].describe(levels[step - 1])}, and {rest}, are left out: {errors[step]}"
                )

    def check_reach(self) -> None:
        """Raises where not even all knobs at their last level meet the budget."""
        self._budget.check_reach({knob: 1 - saved[-1] for knob, saved in self._saved.items()}, notes=self._notes)

    def verify(self, number: int, show_progress: bool) -> None:
        """Measures the best of each knob alone, and of the best sets of knobs."""
        singles = [(knob,) for knob in self._saved]
        sets = [tuple(c.steps) for c in self._best(self._saved, self._budget.most, number + len(singles))]
        several = [found for found in sets if len(found) > 1][:number]
        for used in progress([*singles, *several], "trying combinations", show_progress):
            self._meet(used)
            if len(used) == 1:
                self._add_measured(*used)

    def _add_measured(self, knob: str) -> None:
        """Of a knob alone, the best of all that was measured counts: its levels were, before combinations."""
        for step, trial in self._alone[knob].items():
            best = self._tried.get(knob)
            if self._budget.is_met_by(trial.size) and (best is None or trial.loss < best[1].loss):
                self._tried[knob] = (self._intact.loss + self._costs[knob][step], trial)
        if knob not in self._tried:
            self._notes.append(f"{knob} alone does not meet the budget")

    def _meet(self, used: tuple[str, ...]) -> None:
        """Measures the best combination of exactly these knobs; tightens until its measured size is in the budget."""
        most = self._budget.most
        for _ in range(TIGHTENINGS):
            found = [c for c in self._best(used, most, 1 << len(used)) if set(c.steps) == set(used)]
            if not found:
                return
            try:
                trial = self._trials.measure(self._steps(found[0]))
            except FAILURES as error:
                self._notes.append(f"{describe_steps(self._steps(found[0]))}: {error}")
                return
            if self._budget.is_met_by(trial.size):
                self._tried[" ".join(used)] = (self._intact.loss + found[0].cost, trial)
                return
            most *= min(self._budget.most / self._budget.left(trial.size), 1) * (1 - 1e-3)

    def plan(self) -> FitPlan:
        """The best of what was measured."""
        if not self._tried:
            budget = self._budget
            raise ValueError(
                f"{budget.kind}: expected a budget that measured combinations meet, got {budget.told(budget.value)}; "
                "a larger verify measures more of them"
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
        return best_combinations(saved, costs, most, EXCLUSIVE, number)

    def _steps(self, combination: Combination) -> Steps:
        return {knob: self._levels[knob][step - 1] for knob, step in combination.steps.items()}


def _spread(number: int, count: int) -> list[int]:
    """`count` of the steps 1 to `number`, evenly, both ends included."""
    if number <= count:
        return list(range(1, number + 1))
    return sorted({1 + round(i * (number - 1) / (count - 1)) for i in range(count)})
