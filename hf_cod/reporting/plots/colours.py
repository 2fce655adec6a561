"""The colours of all pictures: viridis, which colour-blind people and grey print can read, and one dark blue.

What matters is also said by position or text, never by colour alone.
"""

# Of heat maps: large values are yellow; but of angles small ones, which mean near, as in Figure 2 of arXiv 2502.05795.
FAR_IS_YELLOW, NEAR_IS_YELLOW = "viridis", "viridis_r"
# Of lines and bars: what the eye should find, and the rest.
INK, PALE = "#26456e", "#9fb4cc"
