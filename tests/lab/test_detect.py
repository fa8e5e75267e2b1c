"""Detection on a small VOCdevkit: regions go where they belong, both modes beat chance, bad proposals are named."""

import dataclasses
import json
import random
import statistics

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_voc import grid_proposals, write_grid, write_small_voc

from training.evaluation.subject import load_subject
from training.reporting.rows import read_file
from training.transfer import detection as detect
from training.transfer.data import CLASSES, AnnotatedImage, open_pixels, read_annotations
from training.transfer.detector import build_detector
from training.transfer.metrics import average_precision, match_detections, mean_over_classes
from training.transfer.network import transfer_network
from training.transfer.pictures import draw_detections, draw_legend, palette
from training.transfer.proposals import check_proposals_file, read_proposals, write_proposals
from training.transfer.recipes import VOC_FAST_RCNN, VOC_FASTER_RCNN

LEARNED = ("aeroplane", "horse")
MODES = ("Fast R-CNN", "Faster R-CNN")


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_small_voc(tmp_path_factory.mktemp("voc"), train=6, test=4)


@pytest.fixture(scope="module")
def proposals(devkit):
    return write_grid(devkit, devkit.parent / "regions.safetensors")


def run(*arguments):
    return detect.main([str(argument) for argument in (*arguments, "--workers", 0)])


def small(recipe, steps=2, lr=0.001, precision="auto"):
    training = dataclasses.replace(recipe.training, steps=steps, lr=lr, precision=precision)
    return dataclasses.replace(
        recipe, training=training, train_sides=(112, 128), test_side=128, longest=400, dropout=0.0
    )


def network_for(images, fc_size=32):
    subject = load_subject("rotnet_alexnet", random=True, size=96)
    return transfer_network(subject, len(CLASSES), [image.file for image in images], fc_size)


@pytest.mark.parametrize("mode", MODES)
def test_the_command_end_to_end(mode, devkit, proposals, tmp_path):
    arguments = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--steps", 2, "--side", 128]
    regions = ["--proposals", proposals] if mode == "Fast R-CNN" else []
    assert run(*arguments, *regions, "--fc-size", 16, "--images-per-step", 1) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    assert [row.protocol for row in rows] == [
        f"voc-{mode.lower().replace(' r-', '-r')}-{kind}" for kind in detect.KINDS
    ]
    assert all(0 <= row.value <= 1 and row.n is None and row.budget == "" for row in rows)
    assert rows[0].settings.startswith(f"{mode}, 2 classes, shorter side 128 in training and 128 in the test, ")
    by_class = json.loads((tmp_path / "classes.json").read_text())
    assert list(by_class) == list(detect.KINDS) and statistics.mean(by_class["area"].values()) == rows[1].value
    assert ("proposals " in rows[0].settings) == bool(regions) and "2 steps of 1 image" in rows[0].settings
    state = load_file(tmp_path / "network.safetensors")
    assert state["roi_heads.box_predictor.cls_score.weight"].shape == (21, 16)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_keeps_boxes_and_scores(mode, devkit, proposals, tmp_path):
    """Whole bfloat16 would move boxes by pixels and make many scores equal: 0.25 to 0.5 has 128 numbers in it."""
    arguments = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--steps", 1, "--side", 128]
    regions = ["--proposals", proposals] if mode == "Fast R-CNN" else []
    assert run(*arguments, *regions, "--fc-size", 16, "--images-per-step", 1, "--precision", "bf16") == 0
    assert read_file(tmp_path / "rows.jsonl")[0].settings.endswith(", bf16")
    images = read_annotations(devkit, "2007", "test")
    torch.manual_seed(0)
    detector = build_detector(small(VOC_FAST_RCNN), network_for(images), 20, given_regions=mode == "Fast R-CNN")
    detector.roi_heads.score_thresh = 0.0
    recipes = [small(VOC_FAST_RCNN, precision=precision) for precision in ("fp32", "bf16")]
    file = proposals if regions else None
    (exact, rounded) = (detect.detect(recipe, detector, images, file) for recipe in recipes)
    for one, other in zip(exact, rounded, strict=True):
        assert other["boxes"].dtype == other["scores"].dtype == torch.float32
        finer = {name: values.bfloat16() != values for name, values in other.items() if name != "labels"}
        assert finer["scores"].float().mean() > 0.9 and finer["boxes"].any(1).float().mean() > 0.5
        assert abs(float(one["scores"].max() - other["scores"].max())) < 0.03


def test_pictures_have_the_sure_detections(devkit, proposals, tmp_path):
    arguments = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--steps", 1, "--side", 128]
    options = ["--fc-size", 16, "--images-per-step", 1, "--pictures", 2, "--proposals", proposals]
    assert run(*arguments, *options) == 0
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["000007.png", "000008.png"]
    with Image.open(tmp_path / "pictures.jpg") as sheet:
        assert sheet.size == (4 * 300, 225 + 2 * 24), "20 classes in two lines below the pictures"
    legend = draw_legend(CLASSES)
    colors = [legend.getpixel((4 + 8 + 120 * (number % 10), 24 * (number // 10) + 12)) for number in range(20)]
    assert colors == palette(20)[1:]
    assert legend.crop((24, 0, 120, 24)).convert("L").getextrema()[0] < 100, "a name beside the first"
    image = read_annotations(devkit, "2007", "test")[0]
    found = {
        "boxes": torch.tensor([[10.0, 60, 100, 120], [0, 0, 50, 50]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.1]),
    }
    picture = open_pixels(draw_detections(tmp_path, image.file, found, CLASSES))
    assert picture.getpixel((40, 119)) == (128, 0, 0), "a frame of the class's colour"
    assert (0, 128, 0) not in {picture.getpixel((x, 0)) for x in range(50)}, "not of an unsure one"


def test_proposals_of_the_test_are_the_first_ones(devkit, proposals):
    images = read_annotations(devkit, "2007", "test")
    _, some = detect._test_sample(proposals, 7, images[0])
    _, all_of_them = detect._test_sample(proposals, None, images[0])
    assert len(some) == 7 < len(all_of_them) and torch.equal(some, all_of_them[:7])


def test_other_networks_detect_too(devkit):
    images = read_annotations(devkit, "2007", "train")
    subject = load_subject("resnet18", random=True, size=64)
    network = transfer_network(subject, 20, [image.file for image in images], scaled=False)
    detector, by_class = detect.measure_detection(small(VOC_FASTER_RCNN), network, images, images, 20)
    assert detector.backbone.out_channels == 512 and len(by_class["area"]) == 20
    # the padding of small images is no part of the map's scale
    pool = detector.roi_heads.box_roi_pool
    ramp = torch.arange(4.0).repeat_interleave(32)[None].expand(64, -1)
    features = torch.nn.functional.avg_pool2d(ramp[None, None], 32)
    maps = pool({"0": features}, [torch.tensor([[64.0, 0.0, 96.0, 32.0]])], [(40, 128)])
    assert maps.shape == (1, 1, 6, 6) and maps.min() >= 1.9


def test_a_network_for_one_size_is_refused(devkit):
    images = read_annotations(devkit, "2007", "train")
    vit = transfer_network(load_subject("vit_tiny_patch16_224", random=True), 20, [], scaled=False)
    with pytest.raises(ValueError, match="VisionTransformer does not take images of any size"):
        detect.measure_detection(small(VOC_FASTER_RCNN), vit, images, images, 20)


def test_fast_rcnn_looks_where_it_is_told(devkit):
    """Regions in an image's own pixels reach the map as they are scaled, and detections come back in pixels."""
    images = read_annotations(devkit, "2007", "train")
    detector = build_detector(small(VOC_FAST_RCNN), network_for(images), 20, given_regions=True).eval()
    seen = []
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    picture = torch.rand(3, 100, 200)
    regions = torch.tensor([[0.0, 0, 200, 100], [50, 25, 100, 50]])
    with torch.inference_mode():
        detector.transform.min_size = (300,)
        (found,) = detector([picture], [regions])
    features, (scaled,), sizes = seen[0]
    # longest is 400: twice as large, not three times
    assert sizes == [(200, 400)] and scaled.tolist() == (2 * regions).tolist()
    # padded to 224 x 416 pixels: 14 x 26 cells of 16
    assert features["0"].shape[-2:] == (14, 26)
    assert found["boxes"].shape[1] == 4 and (found["boxes"] <= torch.tensor([200.0, 100, 200, 100])).all()


def test_mirrored_samples(devkit, proposals):
    images = read_annotations(devkit, "2007", "train")
    seen = set()
    for seed in range(8):
        image = images[0]
        plain, regions, target = detect._training_sample(proposals, image, random.Random(seed))
        easy = image.boxes[~image.difficult]
        moved = not torch.equal(target["boxes"], easy)
        seen.add(moved)
        # what is inside of a box stays inside
        left, top, right, bottom = target["boxes"][0].int().tolist()
        x0, y0, x1, y1 = easy[0].int().tolist()
        original, _ = detect._test_sample(proposals, None, image)
        inside = original[:, y0:y1, x0:x1]
        assert torch.equal(plain[:, top:bottom, left:right], inside.flip(-1) if moved else inside)
        assert (target["labels"] == image.labels[~image.difficult] + 1).all()
        assert regions.shape == grid_proposals(160, 128).shape and (regions[:, 2] > regions[:, 0]).all()
    assert seen == {True, False}


def test_difficult_objects_are_not_trained_on(devkit):
    images = read_annotations(devkit, "2007", "train")
    hard = [dataclasses.replace(image, difficult=torch.ones_like(image.difficult)) for image in images]
    detector = build_detector(small(VOC_FASTER_RCNN), network_for(images), 20, given_regions=False)
    with pytest.raises(ValueError, match="no training image shows an object"):
        detect.train_detector(small(VOC_FASTER_RCNN), detector, hard)


def annotated(boxes, labels, difficult):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return AnnotatedImage(None, 100, 100, boxes, torch.tensor(labels), torch.tensor(difficult, dtype=torch.bool))


def test_precisions_by_hand():
    images = [
        annotated([[0, 0, 10, 10], [50, 50, 90, 90]], [0, 1], [False, False]),
        annotated([[0, 0, 20, 20]], [0], [True]),
        annotated([], [], []),
    ]
    found = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]),
            "labels": torch.tensor([1, 1]),
            "scores": torch.tensor([0.6, 0.9]),
        },
        {
            "boxes": torch.tensor([[0.0, 0, 20, 20]]),
            "labels": torch.tensor([1]),
            "scores": torch.tensor([0.99]),
        },
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)},
    ]
    # class 0: a wrong one, then a right one, the difficult one beside; class 1: named wrongly; class 2: not there
    first, second, third = detect.detection_precisions(found, images, 3, "area")
    assert (first, second) == (0.5, 0.0) and third != third


def test_grids_are_inside_and_everywhere():
    for width, height in ((160, 128), (33, 500), (1, 1)):
        boxes = grid_proposals(width, height)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_proposals_are_written_and_read(tmp_path, devkit):
    image = read_annotations(devkit, "2007", "train")[0]
    file = tmp_path / "regions.safetensors"
    boxes = torch.tensor([[0, 0, 10, 20], [-1, 5, 161, 128]])
    write_proposals(file, {image.name: boxes})
    check_proposals_file(file, [image])
    # numpy's own floats
    save_file({image.name: boxes.double()}, tmp_path / "doubles.safetensors")
    assert read_proposals(tmp_path / "doubles.safetensors", image).dtype == torch.float32
    # a pixel outside is rounding, and cut off
    assert read_proposals(file, image).tolist() == [[0, 0, 10, 20], [0, 5, 160, 128]]


def test_bad_proposals_are_named(tmp_path, devkit):
    images = read_annotations(devkit, "2007", "train")
    for boxes, message in (
        (torch.empty(0, 4), "at least one"),
        (torch.ones(3, 5), r"must be \(n, 4\)"),
        (torch.tensor([[10.0, 0, 5, 5]]), "empty or not finite"),
        (torch.tensor([[0.0, 0, 5, float("nan")]]), "empty or not finite"),
    ):
        with pytest.raises(ValueError, match=f"proposals of 000001 .*{message}"):
            write_proposals(tmp_path / "bad.safetensors", {"000001": boxes})
    save_file({images[0].name: torch.tensor([[0.0, 0, 500, 500]])}, tmp_path / "far.safetensors")
    with pytest.raises(ValueError, match=r"000001 in .*far\.safetensors are outside of its 160 x 128 pixels"):
        read_proposals(tmp_path / "far.safetensors", images[0])
    # written again, in the same process
    write_proposals(tmp_path / "far.safetensors", {images[0].name: torch.tensor([[0.0, 0, 50, 50]])})
    assert read_proposals(tmp_path / "far.safetensors", images[0]).tolist() == [[0, 0, 50, 50]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_it_learns(mode, tmp_path):
    """Two classes at random places. Chance, which gives the grid's regions random scores, is under 5 %."""
    devkit = write_small_voc(tmp_path, train=40, test=20, classes=LEARNED)
    train, test = (read_annotations(devkit, "2007", split) for split in ("trainval", "test"))
    file = write_grid(devkit, tmp_path / "grid.safetensors") if mode == "Fast R-CNN" else None
    grid = [grid_proposals(image.width, image.height) for image in test]
    chances = []
    for label in (CLASSES.index(name) for name in LEARNED):
        truths = [image.boxes[image.labels == label] for image in test]
        difficult = [image.difficult[image.labels == label] for image in test]
        scores, right, total = match_detections(grid, [torch.rand(len(part)) for part in grid], truths, difficult)
        chances.append(average_precision(scores, right, "11-point", total))
    assert max(chances) < 0.05
    recipe = small(VOC_FAST_RCNN if file else VOC_FASTER_RCNN, steps=150 if file else 110, lr=0.004 if file else 0.006)
    _, by_class = detect.measure_detection(recipe, network_for(train, 128), train, test, 20, file)
    found = {kind: mean_over_classes(values) for kind, values in by_class.items()}
    assert min(found.values()) > 0.05 + (0.2 if file else 0.15), found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--proposals", "nowhere.safetensors"], "proposals nowhere.safetensors do not exist"),
        (["--proposals", "{devkit}/VOC2007/Annotations/000001.xml"], "are no safetensors file"),
        (["--proposals", "{few}"], "lack 9 images, 000002 among them"),
        (["--test-proposals", "9"], "--test-proposals is for Fast R-CNN: give --proposals FILE too"),
        (["--side", "10"], "as it is scaled: the network's strides leave nothing of a side under"),
        (["--fc-size", "-1"], "--fc-size must be 0 (no fc layers) or more"),
        (["--side", "0"], "sides must be at least 1 pixel"),
        (["--test", "nothing"], "there are the splits"),
    ],
)
def test_bad_input_is_a_one_line_error(arguments, message, devkit, capsys, tmp_path):
    few = tmp_path / "few.safetensors"
    write_proposals(few, {"000001": torch.tensor([[0.0, 0, 9, 9]])})
    arguments = [argument.format(devkit=devkit, few=few) for argument in arguments]
    start = ["rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path / "out", "--fc-size", 16]
    assert run(*start, "--steps", 1, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_an_image_too_small_is_named(devkit, capsys, tmp_path):
    narrow = write_small_voc(tmp_path, train=2, test=2)
    file = narrow / "VOC2007" / "JPEGImages" / "000003.jpg"
    Image.new("RGB", (400, 4)).save(file)
    xml = narrow / "VOC2007" / "Annotations" / "000003.xml"
    xml.write_text("<annotation><size><width>400</width><height>4</height></size></annotation>")
    assert run("rotnet_alexnet", "--random", "--data", narrow, "--fc-size", 16, "--steps", 1) == 2
    assert f"image {file} is of 1000 x 10 pixels as it is scaled" in capsys.readouterr().err
