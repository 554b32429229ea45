"""The switches of HiMoLoss by name: the method as published, and as released."""

from typing import Any

# What the paper states and what its released code does, switch by switch. Both train with L2-
# normalised features and through the PCA basis. logit_scale is the model's: the paper starts from
# the checkpoint's, the released code from 100, trained and not clamped.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "variance_threshold": 0.9,
        "variance_floor": "relative",
        "component_weight": 1.0,
        "label_smoothing": 0.0,
        "normalize_features": True,
        "normalize_components": True,
        "pca_scope": "global",
        "gather_with_grad": True,
        "differentiate_basis": True,
    },
    "official": {
        "variance_threshold": 0.85,
        "variance_floor": 1e-8,
        "component_weight": 1.0,
        "label_smoothing": 0.1,
        "normalize_features": True,
        "normalize_components": False,
        "pca_scope": "local",
        "gather_with_grad": False,
        "differentiate_basis": True,
    },
}
