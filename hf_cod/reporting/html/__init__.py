"""Reports as interactive pages: one HTML file each, which loads nothing from elsewhere.

The page draws SVG by its own script instead of plotly. plotly's bundle adds 4.7 MB to each page (the cartesian part 1.3
MB), its charts cannot be reached with the keyboard, a screen reader finds no values in them, and its colours do not
follow a dark mode. Bars and one heat map are all that a report needs; `chart.js` draws both.

- `report.html`: the frame; `report.css`: its style.
- `allocation.js`: budgets, as `functional/budget.py`, `scoring/allocation.py` and `functional/lost_energy.py` compute
  them; tests compare the numbers.
- `chart.js`: bars, heat map, axes. `runs.js`: the runs and their tables. `page.js`: controls and what they change.
- `page.py`: puts these and the content of report.json into one file. `space.py`: the same as a static Space.
"""
