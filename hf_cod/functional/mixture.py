"""Ranges of temperature and label weight of a distillation loss; without torch, so that settings can use them."""


def check_mixture(temperature: float, share: float) -> None:
    """Raises ValueError for a temperature or a share of labels out of range."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if not 0 <= share <= 1:
        raise ValueError(f"label_weight: expected a share in 0..1, got {share}")
