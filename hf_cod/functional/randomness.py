"""Random numbers that depend only on counts: equal in every process, and resumable without a stored state."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def generator_of(*counts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by all counts together (a seed, the number of a sample, an index, ...).

    Counts are mixed by SplitMix64's finaliser (Steele et al. 2014), so that neighbouring counts give unrelated numbers.
    """
    state = 0
    for count in counts:
        state = (state + count + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state >> 1)
