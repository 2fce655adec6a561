"""Check of the requirements for plots."""

from __future__ import annotations


def require_plots() -> None:
    """Checks that matplotlib is installed, before a long run instead of after it.

    Raises:
        ImportError: matplotlib is not installed; the message gives the pip command.
    """
    try:
        import hf_cod.reporting.plots  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}, or use --no-plots") from error
