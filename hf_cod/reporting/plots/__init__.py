"""Plots of reports; the only module that imports matplotlib."""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("plots: plotting requires matplotlib: pip install 'hf_cod[plots]'") from error

from hf_cod.reporting.plots.figures import plot_comparison, plot_report

__all__ = ["plot_comparison", "plot_report"]
