"""A search for the layers that a model misses least, by the measured loss of all that is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_cod.compression.depth.removal_probe import RemovalProbe


class LayerSearch:
    """Greedy removal with losses measured anew in each round, then exchanges of removed for kept layers.

    Each step tries the `width` layers alone that promise to cost least, by what each one's removal was last seen to
    cost. Costs grow with the layers that are gone already, so what was measured long ago promises too much and is
    soon tried again.

    Args:
        probe: measures on the text of the search.
        costs: layer -> what the removal of it alone costs, for all that may be removed.
        width: how many layers each step tries.
    """

    def __init__(self, probe: RemovalProbe, costs: dict[int, float], width: int) -> None:
        self._probe, self._width = probe, width
        self._costs = dict(costs)

    def greedy(self, count: int) -> list[int]:
        """`count` layers, one after another, each the one whose removal costs least beside those before it."""
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
        """Puts a removed layer back and takes another one out, as long as that lowers the loss."""
        chosen = sorted(removed)
        (loss,) = self._probe.losses([chosen])
        settled = 0  # layers in a row for which there was nothing better
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
