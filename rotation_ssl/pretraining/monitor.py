"""What one watches to know when to stop: k-NN accuracy and RankMe of the middle layers, as pretraining goes."""

from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from rotation_ssl.features import extract_features, layer_modules, rankme
from rotation_ssl.images import normalize, read_images
from rotation_ssl.labelled import LabelledImages, labelled_files
from rotation_ssl.precision import autocast_type
from rotation_ssl.probes import knn_predict

MOST = 4000  # images looked at, spread over all there are
NEIGHBOURS = 20


class Monitor:
    """Called with the backbone, it prints a line and returns its numbers; the backbone stays as it is.

    Every other image of the folder is classified by the k-NN of those between them.

    Args:
        folder: images by class, ``folder/<class>/*``; one class will do for RankMe alone.
        size: side of the squares that the backbone gets.
        precision: 'fp32' or 'bf16', that the features are computed in.

    Raises:
        ValueError: no such folder, an image that does not decode, or fewer than 4 images.
    """

    def __init__(self, folder: Path, size: int, precision: str = "fp32") -> None:
        files, labels, classes = labelled_files(folder)
        if len(files) < 4:
            raise ValueError(f"{folder} holds {len(files)} images: give at least 4 to monitor by")
        chosen = torch.linspace(0, len(files) - 1, min(MOST, len(files))).round().long()
        # by class, so that the two halves have as many of each
        chosen = chosen[labels[chosen].argsort(stable=True)]
        images = read_images([files[i] for i in chosen], size)
        self.data, self.autocast = LabelledImages(images, labels[chosen], classes), autocast_type(precision)

    def check(self, network: nn.Module) -> None:
        """Refuse a network that has no layers to look at, before it is trained.

        Raises:
            ValueError: it names none, or one gives something else than a map or a vector.
        """
        self._features(network, self.data.images[:1])

    def __call__(self, network: nn.Module) -> dict[str, Any]:
        """k-NN accuracy and RankMe by layer."""
        features = self._features(network, self.data.images)
        knn, rank, (known, asked) = {}, {}, (slice(0, None, 2), slice(1, None, 2))
        classes, labels = len(self.data.classes), self.data.labels
        for layer, rows in features.items():
            neighbours = min(NEIGHBOURS, len(rows[known]))
            predicted = knn_predict(rows[known], labels[known], rows[asked], classes, neighbours)
            knn[layer] = float((predicted == labels[asked]).double().mean())
            rank[layer] = rankme(rows)
        told = ", ".join(f"{layer} {100 * knn[layer]:.1f} %, RankMe {rank[layer]:.0f}" for layer in features)
        tqdm.write(f"k-NN accuracy: {told}")
        return {"knn_accuracy": knn, "rankme": rank}

    def _features(self, network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
        layers = list(layer_modules(network))
        cfg = resolve_model_data_config(network)
        return extract_features(
            network, images, layers[1:-1] or layers, autocast=self.autocast,
            prepare=lambda batch: normalize(batch, cfg["mean"], cfg["std"]),
        )  # fmt: skip
