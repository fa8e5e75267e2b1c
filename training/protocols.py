"""Every protocol of the lab by its id: the one table that rows, card, figures, check, measure and commands look up.

The protocols of frozen layers are the library's. A number is of a protocol at a budget. Numbers of different protocols
never share a column; the paper's, at its own budget, are in a row of their own, in italics.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rotation_ssl.evaluation.protocols import PROTOCOLS as FROZEN
from rotation_ssl.evaluation.protocols import Protocol
from training.evaluation.recipes import FINETUNES, LAYER_PROBES
from training.transfer.recipes import VOC_RECIPES

COVERAGES = range(10, 100, 10)  # percent of photographs, the most confident ones, that accuracy is measured on


def orientation_settings(size: int, temperature: float) -> str:
    """What the orientation's protocols leave open, for the rows."""
    return f"central square and all of elongated pictures, {size} pixels, 4 turns, temperature {temperature:.4g}"


def _protocol(command: str, named: Mapping[str, Any], id: str, title: str, color: str = "") -> Protocol:
    own = (recipe for recipe in named.values() if recipe.protocol == id)
    recipes = {recipe.budget: recipe for recipe in sorted(own, key=lambda recipe: recipe.budget == "paper")}
    # '' is a training with one's own settings
    return Protocol(id, title, color, {"": None, **recipes}, command=command)


def _voc(command: str, recipe: str, title: str, kind: str = "") -> Protocol:
    protocol = _protocol(command, VOC_RECIPES, recipe, f"PASCAL VOC {title}, {f'{kind} ' * bool(kind)}mAP")
    # the paper does not say which average precision its numbers are
    return dataclasses.replace(protocol, id=f"{recipe}-{kind}" if kind else recipe)


PROTOCOLS = FROZEN | {
    protocol.id: protocol
    for protocol in (
        _protocol("probe-layers", LAYER_PROBES, "linear-sgd", "linear probe, max-pooled, SGD", "#E69F00"),
        _protocol("probe-layers", LAYER_PROBES, "nonlinear-sgd", "non-linear probe, remaining layers, SGD", "#009E73"),
        _protocol("finetune", FINETUNES, "finetune-conv", "fine-tuned, convolutional head"),
        _protocol("finetune", FINETUNES, "finetune-nonlinear", "fine-tuned, non-linear head"),
        _protocol("finetune", FINETUNES, "few-labels", "few labels, convolutional probe", "#0072B2"),
        _protocol("finetune", FINETUNES, "supervised", "supervised", "#D55E00"),
        _protocol("orientation", {}, "orientation", "orientation of photographs"),
        *(
            _protocol("orientation", {}, f"orientation-{what}-{percent}", f"{title}, fitted for {percent} % right")
            for percent in ("99", "99.5")
            for what, title in (("decided", "photographs decided"), ("wrong", "photographs decided wrongly"))
        ),
        *(
            _protocol("outliers", {}, f"outliers-{score}{id}", f"outliers by {title}{kind}")
            for score, title in (("rotation", "rotation"), ("knn", "k-NN"))
            for id, kind in (("", ", AUROC"), ("-fpr95", ", FPR at 95 %"))
        ),
        *(
            _protocol("orientation", {}, f"orientation-top-{share}", f"orientation of the most confident {share} %")
            for share in COVERAGES
        ),
        _protocol("outliers", {}, "one-class-knn", "one-class detection by k-NN, AUROC"),
        # quoted only: a network is trained for each class
        _protocol("outliers", {}, "one-class-rotation", "one-class detection by rotation, AUROC"),
        *(_voc("voc", "voc-classification", "classification", kind) for kind in ("", "11-point", "area", "steps")),
        *(_voc("detect", "voc-fast-rcnn", "detection (Fast R-CNN)", kind) for kind in ("", "11-point", "area")),
        *(_voc("detect", "voc-faster-rcnn", "detection (Faster R-CNN)", kind) for kind in ("11-point", "area")),
        _protocol("segment", VOC_RECIPES, "voc-segmentation", "PASCAL VOC segmentation, mean IoU"),
    )
}
