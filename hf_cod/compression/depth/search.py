"""A search for the layers whose joint removal costs least, by the measured loss of the remaining model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_cod.compression.depth.removal_probe import RemovalProbe


class LayerSearch:
    """Greedy removal with losses measured again in each round, then exchanges of removed and kept layers.

    Each step tries only the `width` layers of least expected cost, by the last measured cost of each layer. Costs grow
    with the number of removed layers, so costs that were measured early are too low, and these layers are soon tried
    again.

    Args:
        probe: measures on the samples of the search.
        costs: layer -> cost of its removal alone, for all removable layers.
        width: number of layers that each step tries.
    """

    def __init__(self, probe: RemovalProbe, costs: dict[int, float], width: int) -> None:
        self._probe, self._width = probe, width
        self._costs = dict(costs)

    def greedy(self, count: int) -> list[int]:
        """Selects `count` layers, one after another, each of least cost given the layers removed before it."""
        removed: list[int] = []
        (loss,) = self._probe.losses([removed])
        for number in range(count):
            tried = self._promising(removed)
            found = self._probe.losses([[*removed, i] for i in tried], f"layer {number + 1} of {count}")
            for i, without in zip(tried, found, strict=True):
                self._costs[i] = without - loss
            loss, best = min(zip(found, tried, strict=True))
            removed.append(best)
        return sorted(removed)

    def exchange(self, removed: Iterable[int]) -> list[int]:
        """Replaces removed layers by kept ones, one at a time, while that lowers the loss."""
        chosen = sorted(removed)
        (loss,) = self._probe.losses([chosen])
        settled = 0  # consecutive layers without a better exchange
        turn = list(chosen)
        while settled < len(chosen):
            back = turn.pop(0)
            rest = [i for i in chosen if i != back]
            tried = self._promising(chosen)
            found = self._probe.losses([[*rest, i] for i in tried], f"instead of layer {back}")
            for i, without in zip(tried, found, strict=True):
                self._costs[i] = self._costs[back] + without - loss
            least, best = min(zip(found, tried, strict=True), default=(loss, back))
            if least < loss:
                self._costs[back] = self._costs[best] + loss - least
                loss, chosen, settled = least, [*rest, best], 0
                turn.append(best)
            else:
                settled += 1
                turn.append(back)
        return sorted(chosen)

    def _promising(self, removed: Sequence[int]) -> list[int]:
        kept = [i for i in self._costs if i not in removed]
        return sorted(kept, key=lambda i: (self._costs[i], i))[: self._width]
