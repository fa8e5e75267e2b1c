import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from rotation_ssl import demo
from rotation_ssl.images import normalize, read_image, square


def test_demo_on_the_samples(tmp_path, capsys):
    assert demo.main(["-o", str(tmp_path / "demo.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    images = [line for line in lines if "predicted" in line]
    assert len(images) >= 45
    assert all("rotated" in line and "%" in line for line in images)
    assert any("block1 96x16x16" in line and "block4 192x8x8" in line for line in lines)
    (summary,) = [line for line in lines if "predictions correct" in line]
    assert int(summary.split()[0]) > 0.6 * len(images)
    assert np.asarray(Image.open(tmp_path / "demo.png")).std() > 10


def test_demo_on_own_images(tmp_path, capsys):
    photo = str(SAMPLES / "photos" / "chelsea.jpg")
    assert demo.main([photo, "-o", str(tmp_path / "own.png")]) == 0
    out = capsys.readouterr().out
    assert "chelsea.jpg" in out and "rotated" not in out
    assert (tmp_path / "own.png").exists()


def test_without_matplotlib_the_results_are_printed(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo.main([str(SAMPLES / "photos" / "chelsea.jpg"), "-o", str(tmp_path / "own.png")]) == 0
    captured = capsys.readouterr()
    assert "chelsea.jpg" in captured.out and captured.err == ""
    assert captured.out.endswith("no figure: it needs matplotlib: pip install 'rotation-ssl[demo]'\n")
    assert not (tmp_path / "own.png").exists()


def test_no_image_is_written_over(tmp_path, capsys):
    photo = shutil.copyfile(SAMPLES / "photos" / "chelsea.jpg", tmp_path / "photo.jpg")
    assert demo.main([str(photo), "-o", str(photo)]) == 2
    assert "photo.jpg is one of the images" in capsys.readouterr().err
    assert photo.read_bytes() == (SAMPLES / "photos" / "chelsea.jpg").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_bad_images_are_one_line_errors(tmp_path, capsys, content):
    file = tmp_path / "bad.png"
    if content is not None:
        file.write_bytes(content)
    assert demo.main([str(file), "-o", str(tmp_path / "figure.png")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: image {file}") and "\n" not in error
    assert not (tmp_path / "figure.png").exists()


def test_photographs_are_resized_as_the_weights_say():
    model = timm.create_model("rotnet_nin", pretrained=True)
    photo = square(read_image(SAMPLES / "photos" / "chelsea.jpg"), 300)
    cfg = model.pretrained_cfg
    expected = normalize(TF.pil_to_tensor(square(photo, 32))[None], cfg["mean"], cfg["std"])
    assert cfg["interpolation"] == "bicubic"
    # Pillow's, and torchvision's to a level of 255
    torch.testing.assert_close(demo.to_batch([TF.pil_to_tensor(photo)], model), expected, rtol=0, atol=1.1 / 255 / 0.2)


def test_every_sample_has_a_licence():
    text = (SAMPLES / "LICENSES.md").read_text()
    assert len(list((SAMPLES / "cifar10").glob("*.png"))) >= 40 and "cifar10/<class>_<index>.png" in text
    photos = list((SAMPLES / "photos").iterdir())
    assert len(photos) >= 3
    for photo in photos:
        assert f"photos/{photo.name}" in text
        assert read_image(photo).size != (32, 32)


def test_prediction_is_the_softmax():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
    rotation, probability = demo.predict(model, torch.tensor([[0.0, 0.0, 3.0, 0.0]]))
    assert rotation.item() == 2
    assert probability.item() == pytest.approx(float(np.exp(3) / (np.exp(3) + 3)), abs=1e-6)
