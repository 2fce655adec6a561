"""Names of the norm placements in the code released with the papers."""

from typing import Any

# NORM_TYPE of the code released with the papers -> fields of `NormPlacementConfig`.
AUTHORS_NORM_TYPES: dict[str, dict[str, Any]] = {
    "pre": {"norm_placement": "pre"},
    "scale_pre": {"norm_placement": "scaled_init"},
    "lns": {"norm_placement": "lns"},
    "post": {"norm_placement": "post"},
    "deeppost": {"norm_placement": "deepnorm", "deepnorm_alpha": 8**0.5},
    "post_pre": {"norm_placement": "mix"},
    "scale_post_pre": {"norm_placement": "mix", "scaled_residual_init": True},
    "sandwich": {"norm_placement": "sandwich"},
}
