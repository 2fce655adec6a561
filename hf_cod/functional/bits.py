"""Bit widths of quantized weights, as plain numbers."""

BITS = (3, 4)
# Bits of the scales per weight at block 64: eight for each block, 32 for each 256 blocks.
SCALE_BITS = 8 / 64 + 32 / (64 * 256)
