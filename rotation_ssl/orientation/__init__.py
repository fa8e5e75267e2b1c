"""Which way up a picture is, and how to turn its file back."""

from rotation_ssl.orientation.predict import (
    Calibration,
    Orientation,
    calibration,
    predict_orientation,
    rotation_probabilities,
)

__all__ = ["Calibration", "Orientation", "calibration", "predict_orientation", "rotation_probabilities"]
