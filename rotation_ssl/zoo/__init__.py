"""Published weights: from the name ``model.tag`` to verified bytes, and from these to a model."""

from rotation_ssl.zoo.loading import build_model, cached_file, read_weights, weights_file
from rotation_ssl.zoo.published import WEIGHTS_DIR, bundled, manifest, published_cfgs, published_entry

__all__ = [
    "WEIGHTS_DIR",
    "build_model",
    "bundled",
    "cached_file",
    "manifest",
    "published_cfgs",
    "published_entry",
    "read_weights",
    "weights_file",
]
