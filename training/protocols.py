"""Every protocol of the lab by its id: the one table that rows, card, figures, check, measure and commands look up.

The protocols of frozen layers are the library's. A number is of a protocol at a budget; numbers of different protocols
or budgets never share a column.
"""

from collections.abc import Mapping
from typing import Any

from rotation_ssl.evaluation.protocols import PROTOCOLS as FROZEN
from rotation_ssl.evaluation.protocols import Protocol
from training.evaluation.recipes import LAYER_PROBES, TRANSFERS


def _protocol(command: str, named: Mapping[str, Any], id: str, title: str, color: str = "") -> Protocol:
    recipes = {recipe.budget: recipe for recipe in named.values() if recipe.protocol == id}
    # '' is a training with one's own settings
    return Protocol(id, title, color, {"": None, **recipes}, command=command)


def _voc(command: str, id: str, title: str) -> Protocol:
    return Protocol(id, f"PASCAL VOC {title}", recipes=dict.fromkeys(("", "paper", "cpu")), command=command)


PROTOCOLS = FROZEN | {
    protocol.id: protocol
    for protocol in (
        _protocol("probe-layers", LAYER_PROBES, "linear-sgd", "linear probe, max-pooled, SGD", "#E69F00"),
        _protocol("probe-layers", LAYER_PROBES, "nonlinear-sgd", "non-linear probe, remaining layers, SGD", "#009E73"),
        _protocol("finetune", TRANSFERS, "finetune-conv", "fine-tuned, convolutional probe"),
        _protocol("finetune", TRANSFERS, "finetune-nonlinear", "fine-tuned, non-linear probe"),
        _protocol("finetune", TRANSFERS, "few-labels", "few labels, convolutional probe", "#0072B2"),
        _protocol("finetune", TRANSFERS, "supervised", "supervised", "#D55E00"),
        _voc("voc", "voc-classification", "classification, mAP"),
        _voc("voc", "voc-classification-11-point", "classification, 11-point mAP"),
        _voc("voc", "voc-classification-area", "classification, area mAP"),
        _voc("voc", "voc-classification-steps", "classification, steps mAP"),
        _voc("detect", "voc-fast-rcnn", "detection (Fast R-CNN), mAP"),
        _voc("detect", "voc-fast-rcnn-11-point", "detection (Fast R-CNN), 11-point mAP"),
        _voc("detect", "voc-fast-rcnn-area", "detection (Fast R-CNN), area mAP"),
        _voc("detect", "voc-faster-rcnn-11-point", "detection (Faster R-CNN), 11-point mAP"),
        _voc("detect", "voc-faster-rcnn-area", "detection (Faster R-CNN), area mAP"),
        _voc("segment", "voc-segmentation", "segmentation, mean IoU"),
    )
}
