"""What PASCAL VOC measures: average precision of ranked scores, of detections, and the mean intersection over union.

Definitions of the VOC challenges (Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4), tensors in,
fractions out. A class that the measured images do not have has no number: it is nan, and the means leave it out.
"""

import math
from collections.abc import Sequence

import torch
from torchvision.ops import box_iou

# '11-point': VOC2007, the mean over recalls 0, 0.1, .. 1 of the best precision at that recall or a higher one.
# 'area': from VOC2010 on, the area under that best precision. 'steps': the area under the precision as it is, which
# scikit-learn calls average precision.
KINDS = ("11-point", "area", "steps")
IGNORED = 255
OVERLAP = 0.5


def average_precision(scores: torch.Tensor, right: torch.Tensor, kind: str, total: int | None = None) -> float:
    """Average precision of N scored predictions.

    Args:
        scores: (N,), higher is more confident; predictions of equal score are counted together.
        right: (N,) bool, whether a prediction is a true positive.
        kind: one of :data:`KINDS`.
        total: number of positives, including those that were not predicted; None: the true positives among the N.

    Returns:
        A fraction; nan without positives.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if scores.ndim != 1 or scores.shape != right.shape:
        raise ValueError(f"scores and answers must be (N,), got {tuple(scores.shape)} and {tuple(right.shape)}")
    if scores.isnan().any():
        raise ValueError("scores must be numbers, got nan")
    given = int(right.sum())
    total = given if total is None else total
    if total < given:
        raise ValueError(f"there are {given} true positives, but total says {total} positives")
    if total == 0:
        return math.nan
    if len(scores) == 0:
        return 0.0
    order = scores.argsort(descending=True)
    ranked = scores[order]
    last_of_equals = torch.cat([ranked[1:] != ranked[:-1], torch.tensor([True])])
    found = right[order].double().cumsum(0)[last_of_equals]
    answers = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last_of_equals]
    precision, recall = found / answers, found / total
    if kind != "steps":
        precision = precision.flip(0).cummax(0).values.flip(0)
    if kind == "11-point":
        # recalls as counts: 0.1 * total has no exact float
        points = [precision[10 * found >= point * total] for point in range(11)]
        return sum(float(part[0]) if len(part) else 0.0 for part in points) / 11
    gained = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * precision).sum())


def classification_precisions(scores: torch.Tensor, labels: torch.Tensor, kind: str) -> list[float]:
    """Average precision of each class of a multi-label classification.

    Args:
        scores: (N, K).
        labels: (N, K) 1 for a class that the image shows, 0 for one that it does not, -1 where only difficult objects
            show it: the image does not count for that class.
        kind: one of :data:`KINDS`.

    Returns:
        K fractions, nan for classes that no image shows.
    """
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(f"scores and labels must be (N, K), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    precisions = []
    for score, label in zip(scores.T, labels.T, strict=True):
        counts = label >= 0
        precisions.append(average_precision(score[counts], label[counts] == 1, kind))
    return precisions


def match_detections(
    boxes: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
    difficult: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Match the detections of one class to objects, as VOC's development kit does.

    In the order of their scores, detections are matched to the object that they overlap most, if the intersection over
    union is 0.5 or more: the first one of an object is a true positive, later ones are false positives, and those of a
    difficult object do not count.

    Args:
        boxes: of each image (n, 4), left, top, right, bottom in pixels.
        scores: of each image (n,).
        truths: of each image the objects' boxes (m, 4).
        difficult: of each image (m,) bool.

    Returns:
        The scores (N,) of the detections that count, whether they are true positives (N,), and the number of objects
        that are not difficult.
    """
    kept, right = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for own_boxes, own_scores, own_truths, own_difficult in zip(boxes, scores, truths, difficult, strict=True):
        order = own_scores.argsort(descending=True, stable=True)
        # 1 right, 0 wrong, -1 does not count
        verdicts = torch.zeros(len(order), dtype=torch.int64)
        if len(own_truths) and len(order):
            best, target = box_iou(own_boxes[order].double(), own_truths.double()).max(1)
            taken: set[int] = set()
            for rank in (best >= OVERLAP).nonzero()[:, 0].tolist():
                found = int(target[rank])
                if own_difficult[found]:
                    verdicts[rank] = -1
                elif found not in taken:
                    taken.add(found)
                    verdicts[rank] = 1
        kept.append(own_scores[order][verdicts >= 0].float())
        right.append(verdicts[verdicts >= 0] == 1)
    return torch.cat(kept), torch.cat(right), sum(int((~part).sum()) for part in difficult)


def mean_over_classes(values: Sequence[float]) -> float:
    """The mean of the classes that have a number."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        raise ValueError("none of the classes is in the measured images: there is nothing to average")
    return sum(known) / len(known)


def confusion_matrix(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Pixels by true (rows) and predicted (columns) class, (K, K) int64; those whose truth is 255 do not count.

    Args:
        predicted: classes 0..K - 1, of any shape.
        truth: of the same shape, 0..K - 1 or 255.
        classes: K, the background among them.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction and truth must be of one shape, got {predicted.shape} and {truth.shape}")
    counts = truth != IGNORED
    rows, columns = truth[counts].long(), predicted[counts].long()
    if len(rows) and not 0 <= min(rows.min(), columns.min()) <= max(rows.max(), columns.max()) < classes:
        raise ValueError(f"classes must be 0 to {classes - 1} (or {IGNORED} in the truth, for what does not count)")
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


def intersections_over_unions(confusion: torch.Tensor) -> list[float]:
    """Of each class: pixels that are it and are called it, over pixels that are it or are called it.

    Args:
        confusion: (K, K), of :func:`confusion_matrix`, summed over all images.

    Returns:
        K fractions; nan for a class that the images do not have.
    """
    truth, predicted = confusion.sum(1), confusion.sum(0)
    both = confusion.diagonal().double()
    values = both / (truth + predicted - both)
    return [float(value) if present else math.nan for value, present in zip(values, truth > 0, strict=True)]
