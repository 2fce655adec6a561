"""Reports as interactive pages: one HTML file each, which loads nothing from elsewhere.

The page draws SVG by its own script instead of plotly: bars and one heat map are all that a report needs. plotly would
add megabytes to each page and a dependency, and the layers would still need our own code: plotly's marks cannot be
reached with the keyboard, have no names for a screen reader, and do not follow the dark mode of the system.

- `report.html`: the frame; `report.css`: its style.
- `allocation.js`: budgets, as `functional/budget.py`, `scoring/allocation.py` and `functional/lost_energy.py` compute
  them; tests compare the numbers.
- `chart.js`: bars, heat map, axes. `runs.js`: the runs and their tables. `page.js`: controls and what they change.
- `page.py`: puts these and the content of report.json into one file.
"""
