"""Pictures from reports alone; the only importer of matplotlib."""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("plots: drawing needs matplotlib: pip install 'hf_cod[plots]'") from error

from hf_cod.reporting.plots.figures import plot_comparison, plot_report

__all__ = ["plot_comparison", "plot_report"]
