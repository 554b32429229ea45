"""The presets of HiMoLoss: the published method and the released code."""

from typing import Any

# Both L2-normalise features and differentiate the PCA basis. logit_scale is not set here, as it
# belongs to the model: the paper starts from the checkpoint's value; the released code starts from
# 100 and trains it without a clamp.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "variance_threshold": 0.9,
        "variance_floor": "relative",
        "contrastive_weight": 1.0,
        "component_weight": 1.0,
        "label_smoothing": 0.0,
        "normalize_features": True,
        "normalize_components": True,
        "decompose_images": False,
        "pca_scope": "global",
        "gather_with_grad": True,
        "differentiate_basis": True,
    },
    "official": {
        "variance_threshold": 0.85,
        "variance_floor": 1e-8,
        "contrastive_weight": 1.0,
        "component_weight": 1.0,
        "label_smoothing": 0.1,
        "normalize_features": True,
        "normalize_components": False,
        "decompose_images": False,
        "pca_scope": "local",
        "gather_with_grad": False,
        "differentiate_basis": True,
    },
}
