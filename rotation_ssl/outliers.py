"""Which images do not belong: scores of a rotation network, higher for images that are less like the normal ones.

Two scores. 'rotation' needs no normal images: a network that learned to predict rotations is less sure of images
unlike those it learned on (Golan and El-Yaniv 2018, https://arxiv.org/abs/1805.10917; Hendrycks et al. 2019,
https://arxiv.org/abs/1906.12340). 'knn' is the distance to the nearest of some normal images in a middle layer (Sun et
al. 2022, https://arxiv.org/abs/2204.06507).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.features import extract_features, layer_modules
from rotation_ssl.orientation.predict import check_head, rotation_logits
from rotation_ssl.probes import unit_rows

#: What ``score`` of :class:`RotationOutlierDetector` may be.
SCORES = ("rotation", "knn")
BATCH = 256
UPRIGHT = 0


class RotationOutlierDetector:
    """Outlier scores with the interface of pytorch-ood's detectors; higher means more outlying.

    Args:
        model: a timm model, in eval mode afterwards; for 'rotation' one with 4 outputs.
        score: 'rotation', which needs no :meth:`fit`, or 'knn'.
        layer: a name of :func:`rotation_ssl.features.layer_modules`, for 'knn'.
        neighbours: k, for 'knn': the score is the distance to the k-th nearest normal image.

    Raises:
        ValueError: an unknown score or layer, a model with other outputs, or less than one neighbour.
    """

    def __init__(self, model: nn.Module, score: str = "rotation", layer: str = "", neighbours: int = 10) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if score == "rotation":
            check_head(model)
        elif layer not in layer_modules(model):
            raise ValueError(f"score 'knn' needs a layer, one of {', '.join(layer_modules(model))}, got {layer!r}")
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.model, self.score, self.layer, self.neighbours = model.eval(), score, layer, neighbours
        self.normal: torch.Tensor | None = None

    def fit(self, data_loader: Iterable[Any]) -> "RotationOutlierDetector":
        """Store the features of normal images; for 'rotation' this does nothing.

        Args:
            data_loader: batches of normalised images (B, 3, H, W), or of tuples that begin with them; labels are not
                used.

        Raises:
            ValueError: fewer images than neighbours, or features that are not finite.
        """
        if self.score == "rotation":
            return self
        batches = (batch if isinstance(batch, torch.Tensor) else batch[0] for batch in data_loader)
        features = [self._features(images) for images in batches]
        if not features:
            raise ValueError("no normal images to fit on: give some")
        return self.fit_features(torch.cat(features))

    def fit_features(self, x: torch.Tensor, y: torch.Tensor | None = None) -> "RotationOutlierDetector":
        """Keep features (N, D) of normal images; ``y`` is not used.

        Raises:
            ValueError: fewer rows than neighbours, features that are not finite, or the score has no features.
        """
        self._check_knn()
        if x.ndim != 2 or len(x) < self.neighbours:
            raise ValueError(f"give features (N, D) of at least {self.neighbours} images, got shape {tuple(x.shape)}")
        self.normal = _directions(x)
        return self

    @torch.inference_mode()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (N,) float32, on the CPU, of normalised images (N, 3, H, W); for 'rotation' they must be square.

        Raises:
            ValueError: not fitted, images that are not square, or logits or features that are not finite.
        """
        if self.score == "knn":
            return self.predict_features(self._features(x))
        device = next(self.model.parameters()).device
        # minus the log-probability of the true rotation, averaged over the four rotated copies
        parts = [
            -F.log_softmax(rotation_logits(self.model, part.to(device)), -1)[..., UPRIGHT].mean(1).cpu()
            for part in x.split(BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    def predict_features(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (N,) of features (N, D): the cosine distance to the k-th nearest normal image, k = ``neighbours``.

        Raises:
            ValueError: not fitted, features that are not finite, or the score has no features.
        """
        self._check_knn()
        if self.normal is None:
            raise ValueError("score 'knn' compares with normal images: call fit first")
        normal = self.normal
        parts = [1 - (part @ normal.T).topk(self.neighbours, 1).values[:, -1] for part in _directions(x).split(1000)]
        return torch.cat(parts) if parts else torch.empty(0)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return extract_features(self.model, images, [self.layer])[self.layer]

    def _check_knn(self) -> None:
        if self.score != "knn":
            raise ValueError("score 'rotation' has no features: call predict, or take score 'knn'")


def _directions(features: torch.Tensor) -> torch.Tensor:
    # as float32, which finite float64 may not fit into
    if not features.float().isfinite().all():
        raise ValueError("the features are not finite: check the weights and the images")
    return unit_rows(features)


def auroc(normal: torch.Tensor, outlying: torch.Tensor) -> float:
    """The probability that an outlier's score (M,) is above a normal image's (N,); ties count half.

    Raises:
        ValueError: no scores, or some that are not finite.
    """
    _check_scores(normal, outlying)
    scores = torch.cat([normal, outlying]).double()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    # equal scores share the mean of their ranks, from 1
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]
    above = ranks[len(normal) :].sum() - len(outlying) * (len(outlying) + 1) / 2
    return float(above / (len(normal) * len(outlying)))


def false_positive_rate(normal: torch.Tensor, outlying: torch.Tensor, kept: float = 0.95) -> float:
    """False-positive rate at a true-positive rate of at least ``kept``; by default FPR at 95 % TPR.

    This is the fraction of the outliers' scores (M,) that are accepted by the lowest threshold that accepts the
    fraction ``kept`` of the normal images' scores (N,).

    Raises:
        ValueError: no scores, some that are not finite, or ``kept`` out of range.
    """
    _check_scores(normal, outlying)
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be above 0, up to 1, got {kept}")
    # rounded first: 0.55 of 100 images is 55.00000000000001 in floating point, and not 56
    threshold = normal.sort().values[max(1, math.ceil(round(kept * len(normal), 9))) - 1]
    return float((outlying <= threshold).double().mean())


def _check_scores(*scores: torch.Tensor) -> None:
    if not all(len(each) and each.isfinite().all() for each in scores):
        raise ValueError("give finite scores of at least one normal image and one outlier")
