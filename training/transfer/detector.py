"""The detectors: torchvision's Fast R-CNN and Faster R-CNN on a transferred network.

AlexNet's fc6 and fc7 judge the regions; other networks get two fresh layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import roi_align, roi_pool

from training.transfer.network import Backbone, fc_size_of
from training.transfer.recipes import VocDetection

POOLED = 6  # side of a region's map for AlexNet's fc6


class FastRCNN(nn.Module):
    """Fast R-CNN (Girshick 2015, https://arxiv.org/abs/1504.08083) of torchvision's parts.

    Images and the regions to look at go in; in training, with the objects, the losses come out, otherwise detections,
    as of torchvision's detection models.
    """

    def __init__(self, transform: nn.Module, backbone: Backbone, roi_heads: nn.Module) -> None:
        super().__init__()
        self.transform, self.backbone, self.roi_heads = transform, backbone, roi_heads

    def forward(
        self,
        images: list[torch.Tensor],
        proposals: list[torch.Tensor],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> Any:
        """Losses by name, or for each image 'boxes' (n, 4), 'labels' (n,) from 1 and 'scores' (n,).

        Args:
            images: each (3, H, W), values in 0..1.
            proposals: for each image (n, 4), in its pixels.
            targets: for each image 'boxes' (m, 4) and 'labels' (m,), from 1.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        regions = [
            resize_boxes(boxes, size, scaled)
            for boxes, size, scaled in zip(proposals, sizes, batch.image_sizes, strict=True)
        ]
        features = {"0": self.backbone(batch.tensors)}
        detections, losses = self.roi_heads(features, regions, batch.image_sizes, targets)
        if self.training:
            return losses
        transform: Any = self.transform
        return transform.postprocess(detections, batch.image_sizes, sizes)


class FcHead(nn.Module):
    """AlexNet's fc6 and fc7 on the regions' maps, each with dropout after it: (R, C, 6, 6) -> (R, fc_size)."""

    def __init__(self, fc6: nn.Module, fc7: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc6, self.fc7, self.drop = fc6, fc7, nn.Dropout(dropout)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Features of every region."""
        return self.drop(self.fc7(self.drop(self.fc6(maps.flatten(1)))))


class RegionPool(nn.Module):
    """The regions' maps by one of torchvision's poolings, on a network's only map.

    torchvision's MultiScaleRoIAlign guesses the map's scale from the first images it gets, and wrongly where padding is
    a large part of them.

    Args:
        pool: of a map, its regions, the side of what comes out, and the map's scale: roi_pool, or roi_align.
        reduction: pixels of the image to a cell of the map.
    """

    def __init__(self, pool: Callable[..., torch.Tensor], reduction: int) -> None:
        super().__init__()
        self.pool, self.reduction = pool, reduction

    def forward(
        self, features: dict[str, torch.Tensor], regions: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Maps (R, C, 6, 6) of all regions of all images."""
        return self.pool(features["0"], regions, POOLED, 1 / self.reduction)


def build_detector(recipe: VocDetection, network: nn.Module, classes: int, given_regions: bool) -> nn.Module:
    """A detector of K classes on a transferred network, which it takes over.

    Args:
        network: of :func:`training.transfer.network.transfer_network`.
        classes: K, without the background.
        given_regions: Fast R-CNN, which is given its regions, or else Faster R-CNN.
    """
    cfg = resolve_model_data_config(network)
    head: Any = getattr(network, "head", None)
    fc_size = fc_size_of(network)
    fc_layers = (head.fc6, head.fc7) if fc_size else None
    backbone = Backbone(network)
    width = fc_size or 1024
    box_head = FcHead(*fc_layers, recipe.dropout) if fc_layers else TwoMLPHead(backbone.out_channels * POOLED**2, width)
    predictor = FastRCNNPredictor(width, classes + 1)
    predictor.register_forward_hook(_to_float32)
    sides = {"min_size": recipe.train_sides, "max_size": recipe.longest}
    settings = {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}
    if not given_regions:
        detector = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
            box_head=box_head,
            box_predictor=predictor,
            box_batch_size_per_image=recipe.regions,
            box_nms_thresh=recipe.overlap,
            **sides,
            **settings,
        )
        detector.rpn.head.register_forward_hook(_to_float32)
        detector.roi_heads.box_roi_pool = RegionPool(functools.partial(roi_align, sampling_ratio=2), backbone.reduction)
        return detector
    heads = RoIHeads(
        RegionPool(roi_pool, backbone.reduction),
        box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=recipe.regions,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=recipe.overlap,
        detections_per_img=100,
    )
    return FastRCNN(GeneralizedRCNNTransform(**sides, **settings), backbone, heads)


def set_sides(detector: nn.Module, sides: tuple[int, ...], longest: int) -> None:
    """Let a detector scale images so that the shorter side is one of ``sides``, drawn at random."""
    transform: Any = detector.transform
    transform.min_size, transform.max_size = sides, longest


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Scores and boxes of a layer under autocast: bfloat16 would make many scores equal, and boxes coarse."""
    return type(outputs)(
        [part.float() for part in output] if isinstance(output, list) else output.float() for output in outputs
    )
