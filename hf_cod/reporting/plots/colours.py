"""The colours of all plots: viridis, which is readable for colour-blind readers and in grey print, and one dark blue.

Colour never is the only carrier of information: position or text show the same.
"""

# Heat maps: large values are yellow; for angles, small values (near), as in Figure 2 of arXiv 2502.05795.
FAR_IS_YELLOW, NEAR_IS_YELLOW = "viridis", "viridis_r"
# Lines and bars: highlighted, and all others.
INK, PALE = "#26456e", "#9fb4cc"
