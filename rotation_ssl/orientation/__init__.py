"""Which way up a picture is, and how to turn its file back."""

from rotation_ssl.orientation.predict import Orientation, predict_orientation, rotation_probabilities

__all__ = ["Orientation", "predict_orientation", "rotation_probabilities"]
