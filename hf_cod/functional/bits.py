"""Widths that weights are rounded to, as plain numbers."""

BITS = (3, 4)
# What scales take a weight at block 64: eight bits for each block, 32 for 256 of those.
SCALE_BITS = 8 / 64 + 32 / (64 * 256)
