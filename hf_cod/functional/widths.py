"""From a share of weights to whole heads and multiples of channels.

Symbols: a layer has h heads of a weights each and c channels of b weights each; s is the share of those weights to
keep. A layer without heads (or channels) has h = 0 (c = 0). In a mixture, e channels of each expert have d weights in
all experts together, and the channels above are those of an MLP that all tokens enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Tolerance for rounding errors in sums of shares.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Widths:
    """Numbers of heads, of channels, and of channels of each expert of a layer, before narrowing or after it."""

    heads: int
    channels: int
    experts: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer that can be narrowed: `full` widths, and the weights of one head (`a`), of one channel (`b`), and of one
    channel of all experts (`d`), whose numbers are multiples of `step`.
    """

    full: Widths
    a: int
    b: int
    d: int = 0
    step: int = 1

    def count(self, widths: Widths) -> int:
        """Number of weights of those heads and channels."""
        return widths.heads * self.a + widths.channels * self.b + widths.experts * self.d

    def least(self, multiple: int) -> Widths:
        """The minimum widths: one head, and one multiple of channels."""
        experts = min(self.step, self.full.experts)
        return Widths(min(1, self.full.heads), min(multiple, self.full.channels), experts)


def choose_widths(layers: Sequence[Layer], shares: Sequence[float], multiple: int) -> list[Widths]:
    """Widths for which each layer keeps its share, as closely as whole heads and multiples of channels allow.

    Heads keep the share, rounded. Channels compensate for that rounding, and are rounded to a multiple (or all are
    kept). Where experts have channels, these compensate for both. If layers or shares differ, single layers are then
    changed by one multiple up or down, in falling order of their rounding error, as long as that brings the total
    nearer to the requested one. If all layers and shares are equal, all layers get the same widths, because such a
    model requires no special code; the total may then be off by half a multiple per layer.

    Args:
        layers: layers whose share allows at least the widths `least`.
        shares: shares of the layers' weights, in 0..1.
        multiple: of the numbers of channels, at least 1; those of experts have `Layer.step`.
    """
    chosen = [_nearest(layer, s, multiple) for layer, s in zip(layers, shares, strict=True)]
    if len(set(layers)) == 1 and max(shares) - min(shares) < ROUNDING:
        return chosen
    missing = [s * L.count(L.full) - L.count(w) for L, s, w in zip(layers, shares, chosen, strict=True)]
    gap = sum(missing)
    sign = 1 if gap > 0 else -1
    for i in sorted(range(len(layers)), key=lambda i: -sign * missing[i]):
        moved = _moved(layers[i], chosen[i], sign, multiple)
        step = layers[i].count(moved) - layers[i].count(chosen[i])
        if step and abs(gap - step) < abs(gap):
            chosen[i], gap = moved, gap - step
    return chosen


def _nearest(layer: Layer, s: float, multiple: int) -> Widths:
    """The nearer of the two head counts around the share, unless only the other one lets channels meet the share."""
    target = s * layer.count(layer.full)
    exact = s * layer.full.heads
    heads = {min(max(round_(exact), 1), layer.full.heads) for round_ in (math.floor, math.ceil)}
    options = [_completed(layer, h, s, target - h * layer.a, multiple) for h in sorted(heads)]
    slack = layer.b * multiple / 2 if layer.full.channels else layer.a / 2
    if layer.full.experts:
        slack = layer.d * layer.step / 2

    def off(widths: Widths) -> tuple[bool, float, float]:
        miss = abs(layer.count(widths) - target)
        # A multiple of the channels of experts may weigh more than a head, and leave the layer intact.
        least = min(slack, layer.a / 2) if layer.full.experts and layer.a and widths == layer.full else slack
        return miss > least * (1 + ROUNDING), abs(widths.heads - exact), miss

    candidates = sorted(options, key=off)
    # If no option meets the share, the nearest one is taken.
    return candidates[0] if not off(candidates[0])[0] else min(options, key=lambda widths: off(widths)[2])


def _completed(layer: Layer, heads: int, s: float, weights: float, multiple: int) -> Widths:
    """Widths with this number of heads, whose channels have this number of weights, as closely as multiples allow."""
    full = layer.full
    if not full.experts:
        return Widths(heads, _channels(full.channels, layer.b, weights, multiple))
    channels = _channels(full.channels, layer.b, s * full.channels * layer.b, multiple)
    return Widths(heads, channels, _channels(full.experts, layer.d, weights - channels * layer.b, layer.step))


def _channels(c: int, b: int, weights: float, multiple: int) -> int:
    if not c:
        return 0
    exact = weights / b
    down = max(math.floor(exact / multiple + ROUNDING) * multiple, min(multiple, c))
    return min((min(n, c) for n in (down, down + multiple)), key=lambda n: abs(n - exact))


def _moved(layer: Layer, widths: Widths, sign: int, multiple: int) -> Widths:
    """One multiple of channels more or fewer, of experts where there are some; at most all channels of the layer."""
    if layer.full.experts:
        return replace(widths, experts=_stepped(layer.full.experts, widths.experts, sign, layer.step))
    return replace(widths, channels=_stepped(layer.full.channels, widths.channels, sign, multiple))


def _stepped(c: int, n: int, sign: int, multiple: int) -> int:
    up = min(c, (n // multiple + 1) * multiple)
    down = -(-n // multiple) * multiple - multiple
    return up if sign > 0 else max(down, min(multiple, c))
