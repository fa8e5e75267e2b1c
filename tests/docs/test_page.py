"""The page of docs/try in headless Chromium: the same answers as Python, and a sentence for whatever goes wrong."""

import base64
import re
import shutil

import numpy as np
import PIL
import pytest
import torch
from conftest import SAMPLES
from loopback_release import Release
from PIL import Image, ImageCms, ImageOps
from playwright.sync_api import expect, sync_playwright

from rotation_ssl import zoo
from rotation_ssl.features import attention_map, extract_features
from rotation_ssl.images import normalize, read_image
from rotation_ssl.models import ORIENTATION_MODEL, load_model
from rotation_ssl.orientation import calibration, predict_orientation
from rotation_ssl.orientation.predict import picture_squares
from rotation_ssl.orientation.turning import open_picture
from training import page as builder
from training.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHOTOS = SAMPLES / "photos"
SIZE = zoo.manifest()[ORIENTATION_MODEL]["orientation"]["size"]
PILLOW = int(PIL.__version__.split(".")[0])
TOLERANCE = 1e-3 if PILLOW >= 13 else 5e-3  # before Pillow 13 tall pictures are rounded elsewhere
NO_NETWORK = r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|ETIMEDOUT)\b"
READY = re.compile(r"^Ready")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page, built once; it takes onnxruntime-web from npm."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm: install Node.js")
    output = tmp_path_factory.mktemp("page") / "page"
    try:
        builder.build_page(output)
    except ValueError as error:
        if re.search(NO_NETWORK, str(error)):
            pytest.skip(f"npm has neither a network nor a cache: {error}")
        raise
    return output


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A tab that keeps what it asked for in `asked`, and in which no script may fail."""
    tab = browser.new_page()
    tab.set_default_timeout(60_000)
    tab.asked, failed = [], []
    tab.on("request", lambda request: tab.asked.append((request.method, request.url)))
    tab.on("pageerror", lambda error: failed.append(error))
    yield tab
    tab.close()
    assert not failed


@pytest.fixture
def page(folder, tab):
    """The page, ready, in a tab."""
    with Release(folder) as server:
        tab.goto(server.url)
        expect(tab.locator("#status")).to_have_text(READY, timeout=60_000)
        yield tab
        # whatever a test does: nothing is sent, and all that is loaded is the page's
        assert {(method, url[: len(server.url) + 1]) for method, url in tab.asked} == {("GET", f"{server.url}/")}


@pytest.fixture(scope="module")
def model():
    return load_model(ORIENTATION_MODEL, "cpu")


def look_at(page, files):
    """Choose files; returns the cards that they get, by name."""
    before = page.locator(".card").count()
    page.set_input_files("#files", files)
    expect(page.locator(".card")).to_have_count(before + len(files), timeout=120_000)
    expect(page.locator("#status")).to_have_text(re.compile(rf"^{len(files)} photographs?: "))
    cards = page.locator(".card").all()[before:]
    return dict(zip((card.locator(".name").inner_text() for card in cards), cards, strict=True))


def probabilities_of(card):
    code = "bars => bars.map(bar => Number(bar.style.getPropertyValue('--probability')))"
    return card.locator(".bars li").evaluate_all(code)


def assert_agrees(card, image, model):
    """A card says what Python says of an image."""
    size, temperature, threshold = calibration(model)
    (found,) = predict_orientation(model, [image], temperature, size=size)
    assert probabilities_of(card) == pytest.approx(found.probabilities, abs=TOLERANCE)
    outcome = "undecided" if found.confidence < threshold else "turned" if found.rotation else "upright"
    assert card.get_attribute("data-outcome") == card.locator(".badge").inner_text() == outcome
    assert card.locator(".rotation").inner_text() == f"{90 * found.rotation}° counter-clockwise (k = {found.rotation})"
    fix = f"{found.fix_cw}° clockwise, or {found.fix_ccw}° counter-clockwise" if found.rotation else "none"
    assert card.locator(".fix").inner_text() == fix
    assert card.locator("dd.confidence").inner_text() == f"{100 * probabilities_of(card)[found.rotation]:.1f} %"
    stays = "Not sure enough to decide" in card.inner_text() and "Left as it is" in card.inner_text()
    assert stays == (outcome == "undecided")
    given, fixed = (
        card.locator(name).evaluate("canvas => [canvas.width, canvas.height]") for name in (".given", ".fixed")
    )
    assert fixed == (given[::-1] if outcome == "turned" and found.rotation % 2 else given)
    return found.rotation


def write_pictures(folder):
    """Real photographs in the formats, shapes and orientations that people have."""
    files = []
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # red and blue are swapped by who applies it
    profile = srgb.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    for number, source in enumerate(sorted(PHOTOS.glob("*.jpg"))):
        image = read_image(source)
        exif = Image.Exif()
        exif[0x0112] = (6, 3, 8, 5, 2)[number]
        portrait = image.transpose(Image.Transpose.ROTATE_90)
        transparent = image.copy()
        transparent.putalpha(Image.linear_gradient("L").resize(image.size))
        for picture, name, options in (
            (image, "upright.jpg", {"quality": 92}),
            (portrait, "quarter.png", {}),
            (image, "tagged.jpg", {"exif": exif, "quality": 90, "subsampling": 0}),
            (portrait.convert("L"), "grey.jpg", {"quality": 95}),
            (image, "profile.jpg", {"icc_profile": profile}),
            (transparent, "transparent.png", {}),
            (portrait, "lossless.webp", {"lossless": True}),  # of WebP files Chromium ignores the EXIF orientation
            (image.crop((0, 0, image.width, image.height // 3)), "panorama.png", {}),
            (image.resize((5 * image.width, 5 * image.height)), "large.png", {"exif": exif}),
        ):
            files.append(folder / f"{source.stem}-{name}")
            picture.save(files[-1], **options)
    return files


@pytest.mark.slow
def test_page_says_what_python_says(page, model, tmp_path):
    files = write_pictures(tmp_path)
    cards = look_at(page, files)
    assert list(cards) == [file.name for file in files]
    rotations = {assert_agrees(cards[file.name], open_picture(file, SIZE).image, model) for file in files}
    assert rotations == {0, 1, 2, 3}


@pytest.mark.slow
def test_attention_of_the_whole_stands_beside_that_of_the_square(page, tmp_path):
    image = read_image(PHOTOS / "astronaut.jpg")
    for name, size in (("wide.png", (300, 100)), ("tall.png", (100, 300)), ("thin.png", (1, 1000))):
        image.resize(size).save(tmp_path / name)
        (card,) = look_at(page, [tmp_path / name]).values()
        sizes = "canvas => [canvas.width, canvas.height]"
        shown, drawn = (card.locator(f".{part}").evaluate(sizes) for part in ("fixed", "attention"))
        stacked = int(shown[0] > shown[1])
        expected = list(shown)
        expected[stacked] += min(shown) + 12
        assert drawn == expected
        ends = "canvas => { const { width: w, height: h } = canvas, read = canvas.getContext('2d');"
        ends += f"return [0, {'h' if stacked else 'w'} - 1].map(at => read.getImageData("
        ends += f"{'w / 2, at' if stacked else 'at, h / 2'}, 1, 1).data[3]); }}"
        assert all(card.locator(".attention").evaluate(ends)), "opaque"


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "exif"), ((2, 1), (5, 6), (9, 3)))
def test_large_jpeg_is_reduced_as_pillow_would(page, model, tmp_path, factor, exif):
    source = read_image(PHOTOS / "astronaut.jpg")
    tag = Image.Exif()
    tag[0x0112] = exif
    file = tmp_path / "large.jpg"
    source.resize((320 * factor, 320 * factor + 7), Image.Resampling.BICUBIC).save(file, quality=92, exif=tag)
    (card,) = look_at(page, [file]).values()
    # Python's decoder itself reduces: here Pillow does, from all pixels, as the page
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image.convert("RGB"))
    first = {2: 2, 5: 4, 9: 8}[factor]
    reduced = image.reduce(first)
    rest = min(reduced.size) // (2 * SIZE)
    assert_agrees(card, reduced.reduce(rest) if rest > 1 else reduced, model)
    # and the command, which decodes it at a part of its size, comes to the same rotation
    size, temperature, _ = calibration(model)
    (found,) = predict_orientation(model, [open_picture(file, size).image], temperature, size=size)
    assert probabilities_of(card) == pytest.approx(found.probabilities, abs=0.03)
    assert int(np.argmax(probabilities_of(card))) == found.rotation


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), ((128, 128), (61, 40), (130, 141), (317, 700), (511, 256), (1900, 300)))
def test_squares_are_pillows_to_the_last_bit(page, width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if height - SIZE > max(0, 2 * (width - SIZE)) and PILLOW < 13:
        pytest.skip("before Pillow 13 the width of all pictures is resized first")
    code = f"return text(pictureSquares({{ width: {width}, height: {height}, data: bytes(pixels) }}, {SIZE}));"
    squares = picture_squares(Image.fromarray(values), SIZE).numpy().tobytes()
    assert run_module(page, code, with_alpha(values)) == squares


@pytest.mark.slow
@pytest.mark.parametrize("factor", (2, 3, 5, 6, 7, 8, 11))
def test_pixels_are_reduced_as_pillow_does_to_the_last_bit(page, factor):
    values = np.random.default_rng(factor).integers(0, 256, (83, 110, 3), dtype=np.uint8)
    values[:44] = values[0, 0]  # where all are equal, rounding shows
    code = f"return text(reduce({{ width: 110, height: 83, data: bytes(pixels) }}, {factor}).data);"
    expected = with_alpha(np.asarray(Image.fromarray(values).reduce(factor)))
    assert run_module(page, code, with_alpha(values)) == expected


def with_alpha(values):
    return np.concatenate([values, np.full_like(values[..., :1], 255)], -1).tobytes()


def run_module(page, code, pixels):
    """Run code with the page's functions on pixels; bytes travel as text, which is fast."""
    prelude = (
        "const { pictureSquares, reduce } = await import('./try.js');"
        "const bytes = (text) => Uint8ClampedArray.from(atob(text), (letter) => letter.charCodeAt(0));"
        "const text = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''));"
    )
    result = page.evaluate(f"async (pixels) => {{ {prelude} {code} }}", base64.b64encode(pixels).decode())
    return base64.b64decode(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(builder.SAMPLES))
def test_attention_maps_are_pythons(page, folder, model, name):
    code = (
        "async (name) => { const { loadNetwork, predictOrientation, readPicture } = await import('./try.js');"
        "const network = await loadNetwork(() => {});"
        "const { pixels } = await readPicture(await (await fetch(`samples/${name}`)).blob(), network.size);"
        "return (await predictOrientation(network, pixels)).attention.map((map) => Array.from(map)); }"
    )
    squares = picture_squares(open_picture(folder / "samples" / name, SIZE).image, SIZE)
    cfg = model.pretrained_cfg
    features = extract_features(model, normalize(squares, cfg["mean"], cfg["std"]), ["conv3"], pool=None)["conv3"]
    expected = attention_map(features, 4.0, (SIZE, SIZE)).flatten(1)
    torch.testing.assert_close(torch.tensor(page.evaluate(code, name)), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_samples_are_one_click_and_one_key(page):
    buttons = page.locator("#samples button")
    assert buttons.count() == len(builder.SAMPLES)
    buttons.first.click()
    expect(page.locator(".card")).to_have_count(1)
    buttons.nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(2)
    assert page.locator(".card .name").all_inner_texts() == ["china.jpg", "astronaut.jpg"]
    assert page.locator(".card .badge").all_inner_texts() == ["turned", "turned"]
    assert page.locator("#samples img").evaluate_all("images => images.every(image => image.alt && image.naturalWidth)")


@pytest.mark.slow
def test_dropped_files_are_looked_at_ten_at_once_and_broken_ones_are_named(page, tmp_path):
    content = (PHOTOS / "china.jpg").read_bytes()
    files = [(f"china{number}.jpg", content) for number in range(9)]
    files[4:4] = [("cut <b>short</b>.jpg", content[:300]), ("notes.jpg", b"no picture"), ("empty.png", b"")]
    drop = (
        "(files) => { const transfer = new DataTransfer();"
        "const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));"
        "for (const [name, text] of files) transfer.items.add(new File([bytes(text)], name));"
        "const event = { dataTransfer: transfer, bubbles: true, cancelable: true };"
        "document.body.dispatchEvent(new DragEvent('drop', event)); }"
    )
    page.evaluate(drop, [[name, base64.b64encode(part).decode()] for name, part in files])
    expect(page.locator(".card")).to_have_count(12, timeout=60_000)
    assert page.locator(".card .name").all_inner_texts() == [name for name, _ in files]
    for card in page.locator(".card").all()[4:7]:
        assert "could not be read" in card.inner_text() and card.get_attribute("data-outcome") == "not read"
    expect(page.locator("#status")).to_have_text("12 photographs: 9 upright, 3 not read.")


@pytest.mark.slow
def test_of_many_photographs_little_is_kept(page, tmp_path):
    """Canvases and bitmaps are outside of what JavaScript's collector counts: hundreds of cards filled the memory."""
    file = tmp_path / "large.png"
    read_image(PHOTOS / "china.jpg").resize((1280, 856)).save(file)
    page.evaluate(
        "() => { const make = createImageBitmap; globalThis.made = [];"
        "globalThis.createImageBitmap = async (...given) => (made.push(await make(...given)), made.at(-1)); }"
    )
    (card,) = look_at(page, [file]).values()
    assert card.locator(".given").evaluate("canvas => canvas.width") == 640
    # as if there were a hundred cards
    page.evaluate(
        "() => { const others = Array.from({ length: 99 }, () => document.createElement('p'));"
        "document.querySelector('#results').append(...others); }"
    )
    (card,) = look_at(page, [file]).values()
    assert card.locator(".given").evaluate("canvas => canvas.width") == 240
    assert page.evaluate("made.map(bitmap => bitmap.width)") == [0, 0, 0, 0], "closed"


@pytest.mark.slow
def test_photographs_cannot_leave_the_page(page):
    # without CORS only the page's policy keeps a request from being sent
    code = "(url) => fetch(url, { mode: 'no-cors' }).then(() => 'sent', () => 'refused')"
    with Release(builder.SOURCE) as elsewhere:
        assert page.evaluate(code, f"{elsewhere.url}/icon.svg") == "refused"
        assert elsewhere.requests == []
    page.asked = [(method, url) for method, url in page.asked if not url.startswith(elsewhere.url)]


@pytest.mark.slow
def test_a_photograph_of_100_megapixels_is_looked_at(page, model, tmp_path):
    file = tmp_path / "huge.jpg"
    read_image(PHOTOS / "china.jpg").rotate(180).resize((12_250, 8_192)).save(file, quality=70)
    (card,) = look_at(page, [file]).values()
    assert card.get_attribute("data-outcome") == "turned" and "k = 2" in card.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "sentence"),
    (
        ("WebAssembly.validate = () => false", "no WebAssembly SIMD"),
        ("delete globalThis.WebAssembly", "no WebAssembly SIMD"),
    ),
)
def test_an_old_browser_is_told_so(folder, tab, script, sentence):
    tab.add_init_script(script)
    with Release(folder) as server:
        tab.goto(server.url)
        expect(tab.locator("#status")).to_contain_text(sentence)
        tab.set_input_files("#files", [PHOTOS / "china.jpg"])
        expect(tab.locator("#status")).to_contain_text(sentence)
        expect(tab.locator("progress")).to_be_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("model.json", "model.onnx", *builder.RUNTIME_FILES))
@pytest.mark.parametrize("content", (None, b"damaged"))
def test_a_file_that_does_not_load_is_told(folder, tab, tmp_path, name, content):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with Release(copy) as server:
        tab.goto(server.url)
        expect(tab.locator("#status")).to_contain_text("The network could not be loaded: ")
        if content is None and name != "ort.wasm.bundle.min.mjs":
            expect(tab.locator("#status")).to_contain_text(name)


@pytest.mark.slow
def test_the_page_without_a_script_says_what_it_needs(folder, browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    with Release(folder) as server:
        tab.goto(server.url)
        expect(tab.locator("#status")).to_contain_text("needs JavaScript")
    context.close()


@pytest.mark.slow
def test_page_is_small_and_built_anew(folder, capsys):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    assert not [file for file in files if str(builder.SOURCE.parent.parent).encode() in file.read_bytes()]
    (folder / "index.html").write_text("stale")
    assert main(["page", "--output", str(folder)]) == 0
    assert "MB" in capsys.readouterr().out and (folder / "index.html").read_text() != "stale"
    (folder / ".git").mkdir()
    assert main(["page", "--output", str(folder)]) == 2
    assert "is not a page alone" in capsys.readouterr().err and (folder / ".git").is_dir()
    (folder / ".git").rmdir()


def test_other_folders_are_left_alone(tmp_path, capsys):
    (tmp_path / "model.json").write_text("mine")
    for folder in (tmp_path, tmp_path / "model.json", builder.SOURCE):
        assert main(["page", "--output", str(folder)]) == 2
        assert "is not a page alone: give an empty --output" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model.json"] and (builder.SOURCE / "try.js").is_file()


def test_npm_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["page", "--output", str(tmp_path / "page")]) == 2
    assert "needs npm" in capsys.readouterr().err and not list(tmp_path.iterdir())
