"""Publication against a Hub on loopback, by the real client: what gets there, and that it is what loads."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from conftest import DATA, HUB_ENVIRONMENT, ROOT, published_manifest
from safetensors.torch import load, load_file, save_file

import rotation_ssl
from rotation_ssl import zoo
from rotation_ssl.convert import convert, read_checkpoint, write_folder
from training.reporting import publish
from training.reporting.hub import card, files, upload
from training.reporting.hub.files import hub_files
from training.reporting.hub.weights import Upload
from training.reporting.rows import read_rows

pytestmark = [
    pytest.mark.usefixtures("public_address", "export_once"),
    # the Hub's client, with its own HTTP library
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

NAME = "rotnet_nin.cifar10"
REPOSITORY = f"ORG/{NAME}"


def run(*arguments):
    return publish.main([str(argument) for argument in arguments])


def publish_one(*arguments):
    return run("upload", "--namespace", "ORG", "--weights", NAME, *arguments)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_published_pinned_and_loaded(hub, weights_dir, set_manifest, go_offline, capsys):
    assert publish_one() == 0
    told = manifest_of(weights_dir)[NAME]["hub"]
    revision = hub.repositories[REPOSITORY]["main"]
    assert told == {"repository": REPOSITORY, "revision": revision, "version": "v0.1", "file": "model.safetensors"}
    assert hub.repositories[REPOSITORY]["tags"] == {"v0.1": revision}
    assert revision in capsys.readouterr().out
    # every other door now gives the bytes of the Hub, of the pinned revision
    set_manifest(manifest_of(weights_dir))
    expected = load_file(weights_dir / f"{NAME}.safetensors")
    doors = {
        "timm": lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": None}),
        "hub": lambda: torch.hub.load(
            str(ROOT), "rotnet_nin", source="local", pretrained_cfg_overlay={"file": None}, weights="cifar10"
        ),
        "main": lambda: timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True),
        "version": lambda: timm.create_model(f"hf-hub:{REPOSITORY}@v0.1", pretrained=True),
        "revision": lambda: timm.create_model(f"hf-hub:{REPOSITORY}@{revision}", pretrained=True),
    }
    for door in doors.values():
        assert all(torch.equal(tensor, expected[name]) for name, tensor in door().state_dict().items())
    go_offline()
    hub.requests.clear()
    for door in doors.values():
        door()
    assert hub.requests == []


def test_what_a_repository_holds(hub, weights_dir, tmp_path):
    assert run("upload", "--namespace", "ORG", "--weights", NAME) == 0
    files = hub.repositories[REPOSITORY]["commits"][hub.repositories[REPOSITORY]["main"]]
    names = {".gitattributes", "README.md", "config.json", "model.safetensors", "backbone.safetensors"}
    assert set(files) == names | {"golden.safetensors", "training.json", "curve.png", "onnx/model.onnx"}
    assert files["model.safetensors"] == (weights_dir / f"{NAME}.safetensors").read_bytes()
    backbone = load(files["backbone.safetensors"])
    assert not [key for key in backbone if key.startswith("head.")] and len(backbone) == len(
        load(files["model.safetensors"])
    ) - len(("head.fc.weight", "head.fc.bias"))
    golden = load(files["golden.safetensors"])
    model = timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(golden["input"]), golden["logits"], rtol=1e-3, atol=1e-3)
    config, entry = json.loads(files["config.json"]), published_manifest()[NAME]
    cfg = config["pretrained_cfg"]
    assert config["architecture"] == "rotnet_nin" and config["num_classes"] == 4
    assert (cfg["input_size"], cfg["license"], cfg["tag"]) == ([3, 32, 32], "mit", "cifar10")
    assert cfg["mean"] == entry["mean"] and cfg["std"] == entry["std"]
    assert not {"file", "url", "hf_hub_id", "state_dict"} & set(cfg)
    assert config["sha256"] == entry["sha256"]
    run_record = json.loads(files["training.json"])
    assert run_record["recipe"]["name"] == zoo.manifest()[NAME]["recipe"]
    (tmp_path / "README.md").write_bytes(files["README.md"])
    read = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (read.data.license, read.data.library_name, read.data.model_name) == ("mit", "timm", NAME)
    assert "timm" in read.data.tags
    results = read.data.eval_results
    assert {result.source_url for result in results} == {
        f"https://github.com/ORG/rotation_ssl/blob/v{rotation_ssl.__version__}/MODEL_CARD.md"
    }
    published = {result.metric_name: result.metric_value for result in results}
    assert published == {key: round(100 * value, 2) for key, value in zoo.manifest()[NAME]["metrics"].items()}
    assert len(published) > 10
    for snippet in ('create_model("rotnet_nin.cifar10"', f'"hf-hub:{REPOSITORY}@v0.1"', "torch.hub.load("):
        assert snippet in read.text
    assert f"{100 * published_manifest()[NAME]['metrics']['rotation accuracy']:.2f} %" in read.text


def test_twice_uploads_nothing_new(hub, weights_dir):
    assert publish_one() == 0
    first, revision = list(hub.uploads), hub.repositories[REPOSITORY]["main"]
    told = manifest_of(weights_dir)
    assert publish_one() == 0
    assert hub.uploads == first and hub.repositories[REPOSITORY]["main"] == revision
    assert manifest_of(weights_dir) == told


@pytest.mark.slow
@pytest.mark.parametrize("step", ["preupload", "objects/batch", "/commit/", "resolve/.*golden", "/tag/"])
def test_interrupted_anywhere_and_run_again(hub, weights_dir, step, capsys):
    before = (weights_dir / "manifest.json").read_bytes()
    for method in ("POST", "GET", "HEAD"):
        hub.answer(method, step, 403, times=3)
    assert publish_one() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert (weights_dir / "manifest.json").read_bytes() == before, "nothing is pinned before it is verified"
    hub.answers.clear()
    assert publish_one() == 0
    revision = hub.repositories[REPOSITORY]["main"]
    assert manifest_of(weights_dir)[NAME]["hub"]["revision"] == revision
    assert hub.repositories[REPOSITORY]["tags"] == {"v0.1": revision}
    assert len(hub.uploads) == len(set(hub.uploads)), "no large file goes up twice"


@pytest.mark.slow
def test_killed_after_the_upload_and_run_again(hub, weights_dir, tmp_path):
    """SIGKILL between the commit and everything that comes after it, in a process of its own."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from rotation_ssl import zoo\n"
        "zoo.WEIGHTS_DIR = pathlib.Path(sys.argv[1])\n"
        "from training.reporting import publish\n"
        "from training.reporting.hub import card, upload\n"
        "card.REPOSITORY = upload.REPOSITORY = 'ORG/rotation_ssl'\n"
        "upload._differing = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "publish.main(['upload', '--namespace', 'ORG', '--weights', sys.argv[2]])\n"
    )
    environment = {**os.environ, **HUB_ENVIRONMENT, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(weights_dir), NAME]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -9, result.stderr
    uploaded, revision = list(hub.uploads), hub.repositories[REPOSITORY]["main"]
    assert uploaded and "hub" not in manifest_of(weights_dir)[NAME]
    assert publish_one() == 0
    assert hub.uploads == uploaded and manifest_of(weights_dir)[NAME]["hub"]["revision"] == revision


def test_nothing_is_published_without_an_address(hub, weights_dir, monkeypatch, capsys):
    monkeypatch.setattr(upload, "REPOSITORY", "OWNER/rotation_ssl")
    assert publish_one() == 2
    assert "set REPOSITORY in training/reporting/pages.py" in capsys.readouterr().err and not hub.repositories
    assert publish_one("--dry-run") == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "wants a login"), (403, "no permission"), (412, "someone else committed meanwhile")],
)
def test_refused_by_the_hub(hub, weights_dir, status, message, capsys):
    hub.answer("POST", "/commit/", status, times=9)
    assert publish_one() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "hub" not in manifest_of(weights_dir)[NAME]


def test_a_commit_in_between_is_noticed(hub, weights_dir, monkeypatch, capsys):
    keep = upload._keep_equal

    def commit_meanwhile(*args):
        keep(*args)
        hub.commit(REPOSITORY, {"note.txt": b"meanwhile"})

    monkeypatch.setattr(upload, "_keep_equal", commit_meanwhile)
    assert publish_one() == 2
    assert "someone else committed meanwhile" in capsys.readouterr().err


def test_a_lost_connection_is_no_missing_file(hub, weights_dir, capsys):
    assert publish_one() == 0
    capsys.readouterr()
    hub.answer("HEAD", "resolve/.*model.safetensors", 403, times=9)
    assert publish_one() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "never moves" not in error


def test_a_hub_that_serves_other_bytes_is_not_pinned(hub, weights_dir, capsys):
    hub.corrupt.add("model.safetensors")
    assert publish_one() == 2
    assert "is not what was uploaded: nothing was published" in capsys.readouterr().err
    assert "hub" not in manifest_of(weights_dir)[NAME] and hub.repositories[REPOSITORY]["tags"] == {}


def test_a_version_never_moves(hub, weights_dir, monkeypatch, capsys, tmp_path):
    assert publish_one() == 0
    first, uploaded = hub.repositories[REPOSITORY]["main"], list(hub.uploads)
    other = tmp_path / "card.md"
    other.write_text(card.CARD_TEMPLATE.read_text() + "one more line\n")
    monkeypatch.setattr(card, "CARD_TEMPLATE", other)
    assert publish_one() == 2
    assert "v0.1 of ORG/rotnet_nin.cifar10 has other README.md, and a version never moves" in capsys.readouterr().err
    assert hub.repositories[REPOSITORY] | {"commits": 0} == {"commits": 0, "main": first, "tags": {"v0.1": first}}
    assert hub.uploads == uploaded
    assert publish_one("--version", "v0.2") == 0
    assert manifest_of(weights_dir)[NAME]["hub"]["version"] == "v0.2"
    assert hub.uploads[:-1] == uploaded, "the card alone"


def test_what_others_do_to_main_does_not_matter_to_a_version(hub, weights_dir):
    assert publish_one() == 0
    told = manifest_of(weights_dir)
    edited = hub.commit(REPOSITORY, {"README.md": b"edited by hand"})
    assert publish_one() == 0
    assert manifest_of(weights_dir) == told and hub.repositories[REPOSITORY]["main"] == edited


def test_golden_outputs_of_another_machine_are_kept(hub, weights_dir, capsys):
    assert publish_one() == 0
    uploaded, file = list(hub.uploads), weights_dir / f"{NAME}.golden.safetensors"
    golden = load_file(file)
    save_file(golden | {"logits": golden["logits"] + 1e-5}, file)
    assert publish_one() == 0 and hub.uploads == uploaded
    save_file(golden | {"logits": golden["logits"] + 1e-2}, file)
    assert publish_one() == 2
    assert "has other golden.safetensors" in capsys.readouterr().err


def test_no_connection(hub, weights_dir, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(upload, "HfApi", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    assert publish_one() == 2
    error = capsys.readouterr().err
    assert "no connection" in error and error.count("error: ") == 1


def test_a_dry_run_lists_all_bundled_weights_and_asks_nothing_of_the_hub(hub, weights_dir, monkeypatch, capsys):
    monkeypatch.setattr(files, "onnx_file", lambda *_: b"")
    before = (weights_dir / "manifest.json").read_bytes()
    assert run("upload", "--namespace", "ORG", "--dry-run") == 0
    out = capsys.readouterr().out
    assert hub.requests == [] and (weights_dir / "manifest.json").read_bytes() == before
    assert all(f"ORG/{name}" in out and entry["sha256"] in out for name, entry in zoo.bundled().items())
    assert "backbone.safetensors" in out


def test_all_bundled_weights_are_uploaded(hub, weights_dir, monkeypatch):
    monkeypatch.setattr(files, "onnx_file", lambda *_: b"")
    monkeypatch.setattr(upload, "_keep_equal", lambda *_: None)
    assert run("upload", "--namespace", "ORG") == 0
    entries = manifest_of(weights_dir)
    revisions = {name: hub.repositories[f"ORG/{name}"]["main"] for name in zoo.bundled()}
    assert {name: entries[name]["hub"]["revision"] for name in zoo.bundled()} == revisions


def test_without_onnxruntime_nothing_is_created(hub, weights_dir, monkeypatch, capsys):
    monkeypatch.setattr(upload, "find_spec", lambda name: None)
    assert publish_one() == 2
    assert "the upload compares ONNX files with onnxruntime: pip install -e '.[onnx]'" in capsys.readouterr().err
    assert not hub.repositories


@pytest.fixture
def converted(tmp_path):
    write_folder(convert(read_checkpoint(DATA / "CIFAR10_RotNet_NIN4blocks.tar.gz")), tmp_path / "theirs", "mine", {})
    return tmp_path / "theirs"


def test_a_converted_folder_becomes_a_tag(hub, weights_dir, converted, set_manifest, go_offline, monkeypatch):
    monkeypatch.setattr(files, "onnx_file", lambda *_: b"")
    options = ("--license", "mit", "--trained-on", "CIFAR-10", "--layer", "block2")
    assert run("upload", "--namespace", "ORG", "--weights", converted, *options) == 0
    entries = manifest_of(weights_dir)
    assert entries["rotnet_nin.mine"]["source"] == "hub" and set(entries) == {*published_manifest(), "rotnet_nin.mine"}
    set_manifest(entries)
    model = timm.create_model("rotnet_nin.mine", pretrained=True)
    expected = load_file(converted / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert timm.get_pretrained_cfg("rotnet_nin").tag == "cifar10", "the default stays in the wheel"
    go_offline()
    timm.create_model("rotnet_nin.mine", pretrained=True)


def test_a_folder_that_does_not_say_enough_is_refused(hub, weights_dir, converted, tmp_path, capsys):
    for options, message in (
        ((), "needs --license, --trained-on and --layer"),
        (
            ("--license", "mit", "--trained-on", "x", "--layer", "block9"),
            "rotnet_nin has no layer block9; it has block1",
        ),
    ):
        assert run("upload", "--namespace", "ORG", "--weights", converted, *options) == 2
        assert message in capsys.readouterr().err
    config = json.loads((converted / "config.json").read_text())
    unsigned = {key: value for key, value in config.items() if key not in ("sha256", "size")}
    state = load_file(converted / "model.safetensors")
    headless = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    taken = unsigned["pretrained_cfg"] | {"tag": "cifar10"}
    for change, tensors, message in (
        ({"num_classes": 0}, headless, "lacks the head of the four rotations"),
        ({"pretrained_cfg": taken}, state, f"{NAME} is published already, with other bytes"),
    ):
        (converted / "config.json").write_text(json.dumps(unsigned | change))
        save_file(tensors, converted / "model.safetensors")
        good = ("--license", "mit", "--trained-on", "x", "--layer", "block2")
        assert run("upload", "--namespace", "ORG", "--weights", converted, *good) == 2
        assert message in capsys.readouterr().err
    assert run("upload", "--namespace", "ORG", "--weights", tmp_path) == 2
    assert "holds no config.json and model.safetensors" in capsys.readouterr().err
    assert run("upload", "--namespace", "ORG", "--weights", "rotnet_nin.nope") == 2
    assert "rotnet_nin.nope cannot be published" in capsys.readouterr().err
    assert hub.requests == []


def test_rows_decide_what_the_card_says(weights_dir):
    name, entry = "rotnet_nin.unmeasured", zoo.manifest()[NAME] | {"metrics": {}}
    unmeasured = Upload(name, entry, (weights_dir / f"{NAME}.safetensors").read_bytes())
    text = hub_files(unmeasured, "ORG/x", "v0.1", read_rows())["README.md"].decode()
    assert "Not measured by this project." in text and "model-index" not in text
