"""Evolution of a plan by random changes, judged on few samples first and on all samples at last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hf_cod.compression.search.plan_probe import PlanProbe
from hf_cod.compression.search.spaces import Plan, Space
from hf_cod.functional.randomness import generator_of

# Generations without a new plan after which a search ends: a small model has few plans.
MOST_IDLE = 20


class Evolution:
    """EvoPress (Sieberling et al. 2024, arXiv 2410.14649, algorithm 1): each generation consists of changed copies of
    the best plan. All of them are measured on an eighth of the samples, the best quarter of them on half, and the best
    of these, unless it is worse there than the parent, on all samples, on which the better of it and the parent is
    kept. So the divergence on all samples never rises.

    Samples of a generation are in a random order. All choices depend on the seed and on the numbers of generation and
    copy alone, so that a search whose measurements are in a journal repeats itself.

    Args:
        probe: measures plans.
        space: changes plans.
        offspring: number of changed copies.
        seed: of the random choices.

    Attributes:
        samples: the numbers of all samples.
    """

    def __init__(self, probe: PlanProbe, space: Space, offspring: int, seed: int) -> None:
        self._probe, self._space, self._offspring, self._seed = probe, space, offspring, seed
        self.samples = range(len(probe.batches))

    def best_of(self, plans: Sequence[Plan]) -> Plan:
        """The best of several plans: those among the best quarter on an eighth of the samples, measured on all."""
        plans = [*dict.fromkeys(plans)]
        few = self._best(plans, self.samples[: _share(self.samples, 8)], math.ceil(len(plans) / 4))
        return self._best(few, self.samples, 1)[0]

    def run(self, parent: Plan, passes: int) -> tuple[Plan, int]:
        """Improves a plan until the next generation could exceed this number of passes in all, or until no generation
        of `MOST_IDLE` had a plan that was not measured before.

        Returns:
            The plan, and the number of generations.
        """
        generation = idle = 0
        (least,) = self.divergences([parent], self.samples)
        while self._probe.passes + self.cost() <= passes and idle < MOST_IDLE:
            before = self._probe.passes
            order = torch.randperm(len(self.samples), generator=generator_of(self._seed, generation, 0)).tolist()
            copies = [
                self._space.changed(parent, generator_of(self._seed, generation, number + 1))
                for number in range(self._offspring)
            ]
            generation += 1
            copies = [plan for plan in dict.fromkeys(copies) if plan != parent]
            if not copies:
                break
            copies = self._best(copies, order[: _share(order, 8)], math.ceil(self._offspring / 4))
            half = order[: _share(order, 2)]
            (best,) = self._best(copies, half, 1)
            found, known = self.divergences([best, parent], half)
            if found < known:
                (found,) = self.divergences([best], self.samples)
                if found < least:
                    parent, least = best, found
            idle = 0 if self._probe.passes > before else idle + 1
        return parent, generation

    def start_cost(self, count: int) -> int:
        """The largest number of passes of `best_of` for this number of plans."""
        few = _share(self.samples, 8)
        return count * few + math.ceil(count / 4) * (len(self.samples) - few)

    def cost(self) -> int:
        """The largest number of passes of a generation."""
        few, half = _share(self.samples, 8), _share(self.samples, 2)
        return self._offspring * few + math.ceil(self._offspring / 4) * (half - few) + len(self.samples) - half

    def divergences(self, plans: Sequence[Plan], samples: Sequence[int]) -> list[float]:
        """Of each plan, in nats per token of these samples."""
        return self._probe.of_plans([self._space.values(plan) for plan in plans], samples)

    def _best(self, plans: Sequence[Plan], samples: Sequence[int], count: int) -> list[Plan]:
        """The plans of least divergence; of equal ones the first."""
        found = self.divergences(plans, samples)
        order = sorted(range(len(plans)), key=lambda i: found[i])
        return [plans[i] for i in order[:count]]


def _share(samples: Sequence[int], of: int) -> int:
    return math.ceil(len(samples) / of)
