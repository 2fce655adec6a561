"""What commands need before they begin to draw."""

from __future__ import annotations


def require_plots() -> None:
    """Says that matplotlib is missing before the long work, not after it.

    Raises:
        ImportError: matplotlib is missing; the message says how to add it.
    """
    try:
        import hf_cod.reporting.plots  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}, or give --no-plots") from error
