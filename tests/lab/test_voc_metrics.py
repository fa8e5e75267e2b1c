"""VOC's numbers: worked by hand, the same as scikit-learn's and pycocotools', and the laws that they keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import average_precision_score, jaccard_score, precision_recall_curve

from training.transfer.metrics import (
    KINDS,
    average_precision,
    classification_precisions,
    confusion_matrix,
    intersections_over_unions,
    match_detections,
    mean_over_classes,
)


@st.composite
def rankings(draw, least=1):
    """Scores, with ties among them, and which answers are right."""
    n = draw(st.integers(least, 40))
    scores = draw(st.lists(st.integers(-8, 8), min_size=n, max_size=n))
    right = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    return torch.tensor(scores, dtype=torch.float32) / 4, torch.tensor(right)


def test_by_hand():
    # right, wrong, right, wrong, and a third one that is not found: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3
    scores, right = torch.tensor([0.2, 0.9, 0.5, 0.7]), torch.tensor([False, True, True, False])
    assert average_precision(scores, right, "area", total=3) == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # recalls 0, .1, .2, .3 have precision 1; .4, .5, .6 have 2/3; above there is none
    assert average_precision(scores, right, "11-point", total=3) == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert average_precision(scores, right, "steps", total=3) == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # where precision rises again 'area' takes the later, higher one and 'steps' does not
    late = torch.tensor([True, False, False, True, True, True])
    scores = torch.arange(6, 0, -1).float()
    assert average_precision(scores, late, "area") == pytest.approx((1 + 3 * 4 / 6) / 4)
    assert average_precision(scores, late, "steps") == pytest.approx((1 + 2 / 4 + 3 / 5 + 4 / 6) / 4)
    # ten right of ten: recall 0.1 * k is reached exactly, whatever floats say
    assert average_precision(torch.arange(10).float(), torch.ones(10, dtype=torch.bool), "11-point") == 1.0


def test_what_there_is_not():
    none = torch.empty(0)
    for kind in KINDS:
        assert average_precision(none, none.bool(), kind, total=4) == 0.0
        assert math.isnan(average_precision(torch.ones(3), torch.zeros(3, dtype=torch.bool), kind))
    assert mean_over_classes([0.5, math.nan, 1.0]) == 0.75
    with pytest.raises(ValueError, match="none of the classes"):
        mean_over_classes([math.nan])
    with pytest.raises(ValueError, match="kind must be one of"):
        average_precision(torch.ones(1), torch.ones(1).bool(), "best")
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        average_precision(torch.ones(2), torch.ones(1).bool(), "area")
    with pytest.raises(ValueError, match="nan"):
        average_precision(torch.tensor([math.nan]), torch.ones(1).bool(), "area")
    with pytest.raises(ValueError, match="total says"):
        average_precision(torch.ones(2), torch.ones(2).bool(), "area", total=1)


@given(rankings())
def test_scikit_learn_says_the_same(ranking):
    scores, right = ranking
    assert average_precision(scores, right, "steps") == pytest.approx(average_precision_score(right, scores))
    precision, recall, _ = precision_recall_curve(right.numpy(), scores.numpy())
    # scikit-learn ends with recall 0 and precision 1, a point that no answer stands for
    precision, recall = precision[:-1], recall[:-1]
    eleven = [precision[recall >= k / 10 - 1e-9].max() for k in range(11)]
    assert average_precision(scores, right, "11-point") == pytest.approx(np.mean(eleven))
    best = np.maximum.accumulate(precision)
    area = -np.sum(np.diff(np.append(recall, 0)) * best)
    assert average_precision(scores, right, "area") == pytest.approx(area)


@given(rankings(), st.randoms())
def test_laws_of_average_precision(ranking, rng):
    scores, right = ranking
    order = torch.tensor(rng.sample(range(len(scores)), len(scores)))
    for kind in KINDS:
        value = average_precision(scores, right, kind)
        assert 0 < value <= 1 + 1e-12
        assert average_precision(scores[order], right[order], kind) == pytest.approx(value), "order does not matter"
        assert average_precision(3 * scores - 1, right, kind) == pytest.approx(value), "ranks alone matter"
        assert average_precision(right.float(), right, kind) == pytest.approx(1), "the best ranking"
        assert average_precision(scores, right, kind, int(right.sum()) + 5) < value, "what is missed costs"
        # all scores equal: the part of answers that is right, what chance gives
        assert average_precision(torch.zeros(len(scores)), right, kind) == pytest.approx(float(right.float().mean()))
    assert average_precision(scores, right, "area") >= average_precision(scores, right, "steps") - 1e-12


def test_difficult_images_do_not_count():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]])
    labels = torch.tensor([[-1, 0], [1, 0], [0, 0]])
    first, second = classification_precisions(scores, labels, "area")
    assert first == 1.0 and math.isnan(second)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        classification_precisions(scores, labels[:2], "area")


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def test_detections_by_hand():
    truths = [boxes((0, 0, 10, 10), (20, 20, 30, 30), (50, 0, 60, 10)), boxes((0, 0, 4, 4))]
    difficult = [torch.tensor([False, True, False]), torch.tensor([False])]
    found = [
        boxes((0, 0, 10, 9), (0, 0, 10, 10), (20, 20, 30, 30), (21, 20, 30, 30), (50, 0, 60, 4)),
        boxes((0, 0, 4, 2), (0, 0, 4, 1.9)),
    ]
    # image 1: right; the same object again; difficult, twice; too little of the third. Image 2: exactly half; less.
    scores = [torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0.95, 0.4])]
    kept, right, total = match_detections(found, scores, truths, difficult)
    assert total == 3
    ranked = sorted(zip(kept.tolist(), right.tolist(), strict=True), reverse=True)
    expected = [(0.95, True), (0.9, True), (0.8, False), (0.5, False), (0.4, False)]
    assert [(round(score, 2), verdict) for score, verdict in ranked] == expected
    assert average_precision(kept, right, "area", total) == pytest.approx(2 / 3)
    assert average_precision(kept, right, "11-point", total) == pytest.approx(7 / 11)


def test_the_surer_detection_takes_the_object():
    truth, easy = [boxes((0, 0, 10, 10))], [torch.tensor([False])]
    both = [boxes((0, 0, 10, 10), (0, 0, 10, 8))]
    _, right, _ = match_detections(both, [torch.tensor([0.3, 0.6])], truth, easy)
    assert right.tolist() == [True, False], "sorted by score: the surer one, though it overlaps less"
    # a detection goes to the object that it overlaps most, and is wrong if another took that one
    truths, easy = [boxes((0, 0, 10, 10), (0, 0, 10, 14))], [torch.tensor([False, False])]
    twice = [boxes((0, 0, 10, 10), (0, 0, 10, 11))]
    _, right, _ = match_detections(twice, [torch.tensor([0.6, 0.3])], truths, easy)
    assert right.tolist() == [True, False]


def coco_precision(found, scores, truths, difficult):
    """11-point average precision at an overlap of 0.5, by pycocotools: difficult objects are its crowds."""
    images, sides = range(len(truths)), lambda box: [*box[:2], box[2] - box[0], box[3] - box[1]]
    objects = [
        {"image_id": image, "category_id": 1, "bbox": sides(box), "area": 100, "iscrowd": int(hard)}
        for image in images
        for box, hard in zip(truths[image].tolist(), difficult[image].tolist(), strict=True)
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in images],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(objects, 1)],
        "categories": [{"id": 1}],
        "info": {},
    }
    truth.createIndex()
    results = truth.loadRes(
        [
            {"image_id": image, "category_id": 1, "bbox": sides(box), "score": score}
            for image in images
            for box, score in zip(found[image].tolist(), scores[image].tolist(), strict=True)
        ]
    )
    judge = COCOeval(truth, results, "bbox")
    judge.params.iouThrs, judge.params.recThrs = np.array([0.5]), np.arange(11) / 10
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"][0, :, 0, 0, -1].mean()


@given(st.data())
def test_pycocotools_says_the_same(data):
    """Objects apart from one another, and detections of their size: with others the two match differently."""
    count = data.draw(st.integers(1, 4))
    places = [data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)) for _ in range(count)]
    truths = [boxes(*((40 * place, 0, 40 * place + 10, 10) for place in own)) for own in places]
    difficult = [torch.tensor([data.draw(st.booleans()) for _ in own]) for own in places]
    difficult[0][0] = False
    # of any place, an object's or not; moved by 9 pixels of 10 they miss
    shots = st.lists(st.tuples(st.integers(0, 9), st.sampled_from((0, 1, 2, 9))), min_size=1, max_size=8)
    found = [boxes(*((40 * at + by, 0, 40 * at + by + 10, 10) for at, by in data.draw(shots))) for _ in range(count)]
    ranks = torch.tensor(data.draw(st.permutations(range(sum(map(len, found)))))) / 64
    scores = list(ranks.split([len(own) for own in found]))
    kept, right, total = match_detections(found, scores, truths, difficult)
    ours = average_precision(kept, right, "11-point", total)
    assert ours == pytest.approx(coco_precision(found, scores, truths, difficult))


@given(st.data())
def test_laws_of_detection(data):
    count = data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    coordinate = st.integers(0, 20)

    def some(least, most):
        rows = data.draw(st.lists(st.tuples(coordinate, coordinate), min_size=least, max_size=most))
        sides = [data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20))) for _ in rows]
        return boxes(*[(x, y, x + w, y + h) for (x, y), (w, h) in zip(rows, sides, strict=True)])

    truths = [some(1, 4) for _ in range(count)]
    difficult = [torch.tensor([data.draw(st.booleans()) for _ in own]) for own in truths]
    found = [some(0, 5) for _ in range(count)]
    scores = [torch.rand(len(own), generator=generator) for own in found]
    kept, right, total = match_detections(found, scores, truths, difficult)
    assert right.sum() <= total and len(kept) <= sum(map(len, found))
    # the truths themselves are all right, once each, whatever their order
    scores = [torch.rand(len(own), generator=generator) for own in truths]
    _, right, total = match_detections(truths, scores, truths, [torch.zeros(len(own)).bool() for own in truths])
    distinct = sum(len({tuple(row) for row in own.tolist()}) for own in truths)
    assert right.sum() == distinct and total == sum(map(len, truths))
    # detections of difficult objects alone count neither way
    kept, _, total = match_detections(truths, scores, truths, [torch.ones(len(own)).bool() for own in truths])
    assert len(kept) == 0 and total == 0


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 1]])
    confusion = confusion_matrix(predicted, truth, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    first, second, third = intersections_over_unions(confusion)
    assert (first, second) == (0.5, 0.5) and math.isnan(third)
    with pytest.raises(ValueError, match="0 to 0"):
        confusion_matrix(predicted, truth, 1)
    with pytest.raises(ValueError, match="one shape"):
        confusion_matrix(predicted[0], truth, 3)


@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 2**31))
def test_scikit_learn_says_the_same_of_masks(pixels, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (pixels,), generator=generator)
    predicted = torch.randint(0, classes, (pixels,), generator=generator)
    ours = intersections_over_unions(confusion_matrix(predicted, truth, classes))
    theirs = jaccard_score(truth, predicted, labels=range(classes), average=None, zero_division=0)
    for label in range(classes):
        assert math.isnan(ours[label]) if label not in truth else ours[label] == pytest.approx(theirs[label])
    perfect = intersections_over_unions(confusion_matrix(truth, truth, classes))
    assert mean_over_classes(perfect) == 1.0
