"""The nearest neighbours of images among the features of a folder: exact, by cosine similarity, a chunk at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rotation_ssl.embedding.local import decode_file, make_extractor
from rotation_ssl.embedding.parts import read_manifest
from rotation_ssl.embedding.reading import read_chunks
from rotation_ssl.models import load_model, weights_digest
from rotation_ssl.probes import unit_rows


def nearest(
    folder: str | Path, queries: torch.Tensor, k: int = 10, layer: str | None = None
) -> tuple[torch.Tensor, list[list[str]]]:
    """The k nearest images of each query, by cosine similarity as in the k-NN probe.

    Args:
        folder: of features.
        queries: (M, D), features of the same layer.
        k: number of neighbours.
        layer: None: the first one.

    Returns:
        The similarities (M, k) float32 in descending order, and the paths of each query's images; fewer than k where
        the folder has fewer.

    Raises:
        ValueError: no such folder or layer, queries of another shape, or k out of range.
    """
    layers = read_manifest(Path(folder)).layers
    layer = layer or next(iter(layers))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or layer not in layers or queries.shape[1] != layers[layer]:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit layer {layer}: {folder} has {layers}")
    wanted = unit_rows(queries)
    similarity = torch.empty(len(queries), 0)
    paths: list[list[str]] = [[] for _ in queries]
    for names, features in read_chunks(folder, layer):
        found = wanted @ unit_rows(torch.from_numpy(features.copy())).T
        both = torch.cat([similarity, found], dim=1)
        similarity, order = both.topk(min(k, both.shape[1]), dim=1)
        paths = [
            [old[i] if i < len(old) else names[i - len(old)] for i in row]
            for old, row in zip(paths, order.tolist(), strict=True)
        ]
    return similarity, paths


def embed_images(folder: str | Path, images: Sequence[Path], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Features (N, D) of image files by layer, extracted with the model and settings of a folder of features.

    Raises:
        ValueError: an image that does not exist or cannot be read, or a model whose weights are not those of the
            manifest.
    """
    manifest = read_manifest(Path(folder))
    model = load_model(manifest.model, device)
    if weights_digest(model) != manifest.weights_sha256:
        raise ValueError(f"{manifest.model} has other weights than those that made {folder}; embed the images again")
    extract = make_extractor(model, manifest)
    features: dict[str, list[torch.Tensor]] = {layer: [] for layer in manifest.layers}
    for start in range(0, len(images), manifest.batch_size):
        files = images[start : start + manifest.batch_size]
        pixels = torch.zeros(manifest.batch_size, manifest.size, manifest.size, 3, dtype=torch.uint8)
        for row, file in enumerate(files):
            pixels[row] = torch.from_numpy(decode_file(file, manifest).copy())
        for layer, part in extract(pixels.permute(0, 3, 1, 2)).items():
            features[layer].append(part[: len(files)])
    if not images:
        raise ValueError("no images to find the neighbours of")
    return {layer: torch.cat(parts) for layer, parts in features.items()}
