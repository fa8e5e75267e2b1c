"""Every door x every source x every state of the cache: the published bytes, or a clear error."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import ARCHIVE, HUB_ENVIRONMENT, ROOT, assert_state, corrupt, limited, published_manifest
from loopback_release import Release
from safetensors.torch import load, load_file, save

from rotation_ssl import zoo
from rotation_ssl.convert import convert, read_checkpoint, write_folder
from rotation_ssl.files import sha256_of
from rotation_ssl.zoo import sources

BUNDLED = "rotnet_nin.cifar10"
HUBBED = "rotnet_nin.hubbed"
RELEASED = "rotnet_nin.gidaris_cifar10"
REPOSITORY = "ORG/rotnet_nin.hubbed"

# The table of the documentation, cell by cell: what each door gives for each source and state.
DOORS = ("timm", "torch.hub", "hf-hub", "local-dir", "weights_file")
SOURCES = ("bundled", "hub", "release")
STATES = ("fresh", "cached", "offline", "corrupted")
LOADS = "the published bytes"
NO_REQUEST = "the published bytes, no request"
NO_DOWNLOAD = "the published bytes, no download"
MISSING = "error naming the missing file and the download command"
REFETCHED = "downloaded again, once"
DAMAGED = "error: corrupt file"
NONE = "-"
TABLE = {
    **{
        (door, "bundled", state): DAMAGED if state == "corrupted" else NO_REQUEST
        for door in ("timm", "torch.hub", "weights_file")
        for state in STATES
    },
    **{
        (door, source, state): told
        for door in ("timm", "torch.hub", "weights_file")
        for source in ("hub", "release")
        for state, told in zip(STATES, (LOADS, NO_REQUEST, MISSING, REFETCHED), strict=True)
    },
    # a name of the Hub needs the Hub, and the client looks for config.json first: its error, and its cache
    ("hf-hub", "hub", "fresh"): LOADS,
    ("hf-hub", "hub", "cached"): NO_DOWNLOAD,
    ("hf-hub", "hub", "offline"): "error of the Hub's client",
    ("hf-hub", "hub", "corrupted"): REFETCHED,
    **{("hf-hub", source, state): NONE for source in ("bundled", "release") for state in STATES},
    # a folder is whatever was put there: a download of the Hub, or what `convert` wrote; it needs no network
    **{
        ("local-dir", source, state): DAMAGED if state == "corrupted" else NO_REQUEST
        for source in ("hub", "release")
        for state in STATES
    },
    **{("local-dir", "bundled", state): NONE for state in STATES},
}


@pytest.fixture
def served(hub, release, set_manifest):
    """All three sources on loopback, in the manifest."""
    content = hub_weights()
    hub.create(REPOSITORY)
    revision = hub.commit(REPOSITORY, {"model.safetensors": content, "config.json": hub_config(content)})
    entries = published_manifest()
    entries[RELEASED]["url"] = f"{release.url}/{ARCHIVE.name}"
    entries[HUBBED] = entries[BUNDLED] | {
        "source": "hub",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "hub": {"repository": REPOSITORY, "revision": revision, "version": "v0.1", "file": "model.safetensors"},
    }
    set_manifest(entries)
    return entries


def hub_weights():
    torch.manual_seed(7)
    return save({k: v.contiguous() for k, v in timm.create_model("rotnet_nin").state_dict().items()})


def hub_config(content):
    cfg = {"tag": "hubbed", "num_classes": 4, "input_size": [3, 32, 32], "classifier": "head.fc"}
    cfg |= {"first_conv": "blocks.block1.0.conv"}
    described = {"architecture": "rotnet_nin", "num_classes": 4, "pretrained_cfg": cfg}
    described |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    return json.dumps(described).encode()


def name_of(source):
    return {"bundled": BUNDLED, "hub": HUBBED, "release": RELEASED}[source]


def expected_state(source):
    if source == "bundled":
        # not load_file, whose tensors change with the file
        return load((zoo.WEIGHTS_DIR / f"{BUNDLED}.safetensors").read_bytes())
    if source == "hub":
        return load(hub_weights())
    return convert(read_checkpoint(ARCHIVE)).state_dict


def go_through(door, source, folder):
    """Load through a door: the state dict, or the error."""
    name = name_of(source)
    if door == "timm":
        return timm.create_model(name, pretrained=True).state_dict()
    if door == "torch.hub":
        tag = name.split(".", 1)[1]
        return torch.hub.load(str(ROOT), "rotnet_nin", source="local", weights=tag).state_dict()
    if door == "hf-hub":
        return timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).state_dict()
    if door == "local-dir":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    return load_file(zoo.weights_file(name))


def make_folder(source, folder):
    if source == "hub":
        huggingface_hub.snapshot_download(REPOSITORY, local_dir=folder)
    else:
        write_folder(convert(read_checkpoint(ARCHIVE)), folder, "gidaris", {})


def cached(source, folder, door):
    if door == "local-dir":
        return folder / "model.safetensors"
    if source == "hub":
        return zoo.cached_file(HUBBED).resolve()
    return zoo.cached_file(name_of(source))


@pytest.fixture
def wheel_copy(weights_dir, set_manifest, served):
    """The bundled weights where a test may damage them."""
    set_manifest(served)
    return weights_dir


def test_the_documented_table_is_this_one():
    text = (ROOT / "docs" / "loading.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    head, _, *rows = rows
    assert head == ["loaded by", "source", *STATES]
    documented = {(row[0], row[1], state): cell for row in rows for state, cell in zip(STATES, row[2:], strict=True)}
    assert documented == TABLE


def test_the_table_is_whole():
    assert set(TABLE) == {(door, source, state) for door in DOORS for source in SOURCES for state in STATES}


CELLS = [(*cell, told) for cell, told in TABLE.items() if told != NONE]


# that nobody vouches for a release is told once, and tested below
@pytest.mark.filterwarnings("ignore:no published hash")
@pytest.mark.parametrize(("door", "source", "state", "told"), CELLS, ids=lambda value: value.split(":")[0])
def test_door(door, source, state, told, hub, release, wheel_copy, go_offline, tmp_path):
    folder = tmp_path / "folder"
    if door == "local-dir":
        make_folder(source, folder)
    if state in ("cached", "corrupted") and door != "local-dir":
        go_through(door, source, folder)
    if state == "corrupted":
        corrupt(cached(source, folder, door))
    if state == "offline":
        go_offline()
    hub.requests.clear()
    release.requests.clear()
    if told in (LOADS, NO_REQUEST, NO_DOWNLOAD, REFETCHED):
        state_dict, expected = go_through(door, source, folder), expected_state(source)
        assert_state(state_dict, expected)
        asked = [r for r in (*hub.requests, *release.requests) if r.startswith(("GET", "/"))]
        if told == NO_REQUEST:
            assert not hub.requests and not release.requests
        else:
            # of the Hub's main branch the client asks what it is, each time
            weights = [r for r in asked if "model.safetensors" in r or ARCHIVE.name in r]
            assert len(weights) == (0 if told == NO_DOWNLOAD else 1)
        if told in (NO_DOWNLOAD, REFETCHED):
            hub.requests.clear()
            release.requests.clear()
            go_offline()
            go_through(door, source, folder)
            assert not hub.requests and not release.requests
    elif told == MISSING:
        with pytest.raises(
            FileNotFoundError, match=rf"not cached.* is missing; .*rotation-ssl fetch {name_of(source)}"
        ):
            go_through(door, source, folder)
        what = REPOSITORY + "@" + zoo.manifest()[HUBBED]["hub"]["revision"] if source == "hub" else ARCHIVE.name
        with pytest.raises(FileNotFoundError, match=what):
            go_through(door, source, folder)
    elif told == DAMAGED:
        with pytest.raises(ValueError, match=r"are corrupt: .* has sha256"):
            go_through(door, source, folder)
    else:
        with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
            go_through(door, source, folder)


# each source through timm, and a folder; a file of the Hub lies in the client's cache, read as the others are
RACES = [("timm", "bundled"), ("timm", "hub"), ("timm", "release"), ("local-dir", "release")]


@pytest.mark.filterwarnings("ignore:no published hash")
@pytest.mark.parametrize(("door", "source"), RACES)
def test_a_file_that_changes_once_it_is_hashed_changes_nothing(
    door, source, hub, release, wheel_copy, tmp_path, monkeypatch
):
    folder = tmp_path / "folder"
    if door == "local-dir":
        make_folder(source, folder)
    else:
        go_through(door, source, folder)
    file = cached(source, folder, door)
    expected = expected_state(source)
    sha256 = hashlib.sha256

    def hash_then_change(content=b""):
        digest = sha256(content)
        if len(content) == file.stat().st_size:
            corrupt(file)
        return digest

    monkeypatch.setattr(sources.hashlib, "sha256", hash_then_change)
    state_dict = go_through(door, source, folder)
    monkeypatch.undo()
    with pytest.raises(sources.Mismatch):
        sources.read_verified(file, sha256(save(expected)).hexdigest(), file.stat().st_size)
    assert_state(state_dict, expected)


@pytest.mark.filterwarnings("ignore:no published hash")
def test_an_archive_that_changes_once_it_is_hashed_changes_nothing(release, wheel_copy, monkeypatch):
    """What is converted and recorded is what was hashed."""
    read, folder = sources.read_checkpoint, sources.release_cache()

    def change_then_read(file, **options):
        file.write_bytes(b"something else")
        return read(file, **options)

    monkeypatch.setattr(sources, "read_checkpoint", change_then_read)
    state_dict, expected = go_through("timm", "release", folder), expected_state("release")
    assert_state(state_dict, expected)


SWAP = """
import os, pathlib, sys
file, other, good = (pathlib.Path(name) for name in sys.argv[2:])
print("ready", flush=True)
while True:
    if sys.argv[1] == "rename":
        for version in (other, good):
            os.link(version, "swap")
            os.replace("swap", file)
    else:
        with file.open("r+b") as stream:
            for content in (other.read_bytes(), good.read_bytes()):
                stream.seek(len(content) // 2)
                stream.write(content[len(content) // 2 :])
                stream.flush()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rename", "in place"])
def test_another_process_that_swaps_the_file_never_gets_other_weights_loaded(how, wheel_copy, tmp_path):
    """Each of 500 loads gives the published bytes or says that the file is corrupt."""
    file = wheel_copy / f"{BUNDLED}.safetensors"
    good, other = (shutil.copyfile(file, tmp_path / name) for name in ("good", "other"))
    corrupt(other)
    expected = expected_state("bundled")
    loaded = refused = 0
    command = [sys.executable, "-c", SWAP, how, str(file), str(other), str(good)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as swapping:
        assert swapping.stdout.readline() == "ready\n"
        try:
            for _ in range(500):
                try:
                    state_dict = timm.create_model(BUNDLED, pretrained=True).state_dict()
                except ValueError as error:
                    assert "corrupt" in str(error)
                    refused += 1
                else:
                    assert_state(state_dict, expected)
                    loaded += 1
        finally:
            swapping.kill()
    assert loaded + refused == 500 and loaded and refused


def test_a_model_with_classes_of_its_own_gets_the_verified_backbone(served):
    model = timm.create_model(HUBBED, pretrained=True, num_classes=10)
    assert torch.equal(model.blocks.block2[0].conv.weight, expected_state("hub")["blocks.block2.0.conv.weight"])
    maps = timm.create_model(HUBBED, pretrained=True, features_only=True)
    assert torch.equal(maps.blocks_block2[0].conv.weight, model.blocks.block2[0].conv.weight)


def test_the_hub_serves_other_bytes_of_the_same_size(hub, served):
    """Over plain HTTP the client checks the size alone."""
    hub.corrupt.add("model.safetensors")
    with pytest.raises(ValueError, match=r"is not what rotation_ssl published as rotnet_nin\.hubbed: .* has sha256"):
        timm.create_model(HUBBED, pretrained=True)
    assert len([r for r in hub.requests if r.startswith("GET") and "model.safetensors" in r]) == 2, "refetched once"
    assert zoo.cached_file(HUBBED) is None, "what is damaged is not left behind"
    hub.corrupt.clear()
    timm.create_model(HUBBED, pretrained=True)


def test_a_damaged_cache_without_links_is_downloaded_again(hub, served, monkeypatch, go_offline):
    """Where there are no symbolic links the client keeps the file that is there, even if told to download it."""
    monkeypatch.setattr(huggingface_hub.file_download, "are_symlinks_supported", lambda folder=None: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS_WARNING", True)
    file = zoo.weights_file(HUBBED)
    assert not file.is_symlink()
    corrupt(file)
    assert sha256_of(zoo.weights_file(HUBBED)) == served[HUBBED]["sha256"]
    corrupt(file)
    damaged = file.read_bytes()
    go_offline()
    with pytest.raises(OSError, match=r"are corrupt .* and downloading them failed"):
        zoo.weights_file(HUBBED)
    assert file.read_bytes() == damaged, "what cannot be replaced is not taken away"


def test_a_moved_main_changes_nothing_for_pinned_weights(hub, served):
    other = hub_weights()[:-4] + b"\0\0\0\0"
    hub.commit(REPOSITORY, {"model.safetensors": other})
    state = timm.create_model(HUBBED, pretrained=True).state_dict()
    assert torch.equal(state["head.fc.weight"], expected_state("hub")["head.fc.weight"])
    with pytest.raises(ValueError, match=r"main of ORG/rotnet_nin\.hubbed is not, or no longer.*upgrade"):
        timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True)
    pinned = served[HUBBED]["hub"]["revision"]
    timm.create_model(f"hf-hub:{REPOSITORY}@{pinned}", pretrained=True)


def test_another_repository_is_loaded_unverified_but_checked(hub, served):
    hub.create("SOMEONE/tuned")
    hub.commit("SOMEONE/tuned", {"model.safetensors": hub_weights(), "config.json": hub_config(hub_weights())})
    model = timm.create_model("hf-hub:SOMEONE/tuned", pretrained=True)
    assert torch.equal(model.head.fc.weight, expected_state("hub")["head.fc.weight"])
    assert model.pretrained_cfg["tag"] and not zoo.published_entry(model), "somebody's weights have no calibration"
    hub.commit("SOMEONE/tuned", {"model.safetensors": save({"wrong": torch.zeros(3000)})})
    with pytest.raises(ValueError, match="SOMEONE/tuned does not fit"):
        timm.create_model("hf-hub:SOMEONE/tuned", pretrained=True, num_classes=10)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", r"the Hub requires a login for ORG/rotnet_nin\.hubbed: `hf auth login`"),
        (404, "RepoNotFound", "has no repository ORG/rotnet_nin.hubbed"),
        (404, "RevisionNotFound", r"the Hub has no model\.safetensors of ORG/rotnet_nin\.hubbed@"),
        (404, "EntryNotFound", r"the Hub has no model\.safetensors of ORG/rotnet_nin\.hubbed@"),
        (403, "", "could not be downloaded"),
    ],
)
def test_the_hub_refuses(hub, served, status, code, message):
    hub.answer("HEAD", "model.safetensors", status, 9, code)
    hub.answer("GET", "model.safetensors", status, 9, code)
    with pytest.raises(OSError, match=message) as error:
        timm.create_model(HUBBED, pretrained=True)
    assert "\n" not in str(error.value)


def test_a_download_from_the_hub_that_breaks_off(hub, served, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut.add("model.safetensors")
    with pytest.raises(OSError, match=r"rotnet_nin\.hubbed could not be downloaded"):
        timm.create_model(HUBBED, pretrained=True)
    assert zoo.cached_file(HUBBED) is None
    hub.cut.clear()
    timm.create_model(HUBBED, pretrained=True)


def test_a_release_is_recorded_and_its_change_noticed(release, served):
    with pytest.warns(UserWarning, match=r"no published hash of .* sha256 [0-9a-f]{64}, recorded in"):
        file = zoo.weights_file(RELEASED)
    record = sources.read_record(RELEASED)
    assert record["archive_sha256"] == sha256_of(ARCHIVE)
    assert record["sha256"] == sha256_of(file) and record["url"] == served[RELEASED]["url"]
    # the release is replaced: weights in the cache are kept, a new download is refused
    content = (release.folder / ARCHIVE.name).read_bytes()
    (release.folder / ARCHIVE.name).write_bytes(content + b"\0" * 512)
    assert zoo.weights_file(RELEASED) == file
    corrupt(file)
    with pytest.raises(ValueError, match=r"the release changed; nothing was kept.*--accept-new-hash"):
        zoo.weights_file(RELEASED)
    with pytest.warns(UserWarning, match="no published hash"):
        zoo.weights_file(RELEASED, accept_new_hash=True)
    assert sources.read_record(RELEASED)["archive_sha256"] == hashlib.sha256(content + b"\0" * 512).hexdigest()
    assert zoo.weights_file(RELEASED) == file


def test_a_hash_of_the_manifest_is_not_overruled(release, served, set_manifest):
    served[RELEASED]["archive_sha256"] = "0" * 64
    set_manifest(served)
    for accept in (False, True):
        with pytest.raises(ValueError, match=r"not the 0{64} of the manifest; nothing was kept"):
            zoo.weights_file(RELEASED, accept_new_hash=accept)
    served[RELEASED]["archive_sha256"] = sha256_of(ARCHIVE)
    zoo.weights_file(RELEASED)


def left_in(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_release_that_breaks_off_leaves_nothing(release, served):
    release.cut = True
    with pytest.raises(ConnectionError, match=r"broke off after [\d,]+ of [\d,]+ bytes: try again"):
        zoo.weights_file(RELEASED)
    assert left_in(sources.release_cache()) == []


@pytest.mark.parametrize(("url", "message"), [("/nothing.tar.gz", "answers 404"), (None, "cannot be reached")])
def test_a_release_that_is_not_there(release, served, set_manifest, url, message):
    served[RELEASED]["url"] = f"{release.url}{url}" if url else "http://127.0.0.1:9/x.tar.gz"
    set_manifest(served)
    with pytest.raises(ConnectionError, match=message):
        zoo.weights_file(RELEASED)
    assert left_in(sources.release_cache()) == []


def test_an_archive_of_another_model_is_refused(release, served, set_manifest):
    served["rotnet_alexnet.gidaris_in1k"]["url"] = served[RELEASED]["url"]
    set_manifest(served)
    with pytest.raises(ValueError, match=r"contains a rotnet_nin, not rotnet_alexnet\.gidaris_in1k; nothing was kept"):
        timm.create_model("rotnet_alexnet.gidaris_in1k", pretrained=True)
    assert left_in(sources.release_cache()) == []


PROLOGUE = """
import json, pathlib, resource, signal, sys, warnings
import huggingface_hub, torch, rotation_ssl
from rotation_ssl import zoo
from rotation_ssl.zoo import download, sources
folder, entries = sys.argv[1], json.loads(sys.argv[2])
torch.hub.get_dir = lambda: folder
huggingface_hub.constants.HF_HUB_CACHE = folder + "/hub"
zoo.manifest().clear()
zoo.manifest().update(entries)
warnings.simplefilter("ignore")
"""
FETCH = "print(zoo.weights_file('rotnet_nin.gidaris_cifar10'))"
FETCH_BOTH = FETCH + "; print(zoo.weights_file('rotnet_nin.hubbed'))"


def start(code, folder, entries):
    command = [sys.executable, "-c", PROLOGUE + code, str(folder), json.dumps(entries)]
    environment = {**os.environ, **HUB_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_first_loads_of_many_processes_at_once(hub, release, served, tmp_path):
    hub.requests.clear()
    processes = [start(FETCH_BOTH, tmp_path / "cache", served) for _ in range(4)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    assert release.requests.count(f"/{ARCHIVE.name}") == 1, "one downloads, the others wait for it"
    assert len([r for r in hub.requests if r.startswith("GET") and "model.safetensors" in r]) == 1
    assert sha256_of(Path(results[0][0].split()[1])) == served[HUBBED]["sha256"]
    (file, record) = (tmp_path / "cache" / "rotation_ssl" / f"{RELEASED}.{end}" for end in ("safetensors", "json"))
    assert sha256_of(file) == json.loads(record.read_text())["sha256"]


@pytest.mark.slow
def test_killed_while_writing_and_fetched_again(served, tmp_path):
    """SIGKILL at the worst moments: after the download, and between the weights and their record."""
    for moment in ("read_checkpoint", "replace_bytes"):
        kill = (
            f"import os\ntold = sources.{moment}\n"
            "calls = []\n"
            "def killed(*args, **options):\n"
            "    calls.append(args)\n"
            f"    if len(calls) == {2 if moment == 'replace_bytes' else 1}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return told(*args, **options)\n"
            f"sources.{moment} = killed\n"
        )
        process = start(kill + FETCH, tmp_path / moment, served)
        assert process.communicate() and process.returncode == -9
        folder = tmp_path / moment / "rotation_ssl"
        assert not (folder / f"{RELEASED}.json").exists() and left_in(folder)
        process = start(FETCH, tmp_path / moment, served)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert left_in(folder) == [f"{RELEASED}.json", f"{RELEASED}.safetensors"]


def test_a_full_disk(release, served):
    """The system refuses to write more than 1 MB to any file."""
    with (
        limited(resource.RLIMIT_FSIZE, 10**6),
        pytest.raises(OSError, match=r"rotation_ssl cannot be written .*TORCH_HOME"),
    ):
        zoo.weights_file(RELEASED)
    assert left_in(sources.release_cache()) == []


def test_a_cache_that_cannot_be_written(release, served, tmp_path, monkeypatch):
    (tmp_path / "torch-hub").write_text("a file where the cache should be")
    with pytest.raises(OSError, match=r"torch-hub.* cannot be written .*TORCH_HOME"):
        zoo.weights_file(RELEASED)


def test_a_filled_read_only_cache_is_only_read(release, served, monkeypatch):
    with pytest.warns(UserWarning, match="no published hash"):
        file = zoo.weights_file(RELEASED)
    folder = file.parent
    before = {entry.name: entry.stat().st_mtime_ns for entry in (folder, *folder.iterdir())}
    monkeypatch.setattr(sources, "FileLock", None)
    monkeypatch.setattr(sources.Path, "mkdir", None)
    assert zoo.weights_file(RELEASED) == file
    assert before == {entry.name: entry.stat().st_mtime_ns for entry in (folder, *folder.iterdir())}


def test_the_manifest_says_what_timm_is_told():
    for name, entry in published_manifest().items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.has_weights and cfg.license == entry["license"]
        assert (cfg.input_size, cfg.mean, cfg.std) == tuple(tuple(entry[key]) for key in ("input_size", "mean", "std"))
        wanted = {"license", "origin", "recipe", "data", "recommended_layer", "metrics", "file", "sha256", "size"}
        assert wanted <= set(entry)
        if entry["source"] == "release":
            assert entry["url"].startswith("https://github.com/gidariss/FeatureLearningRotNet/releases/download/v1/")


def test_no_default_needs_the_network():
    for model in timm.list_models("rotnet_*"):
        cfg = timm.get_pretrained_cfg(model)
        assert not cfg.url and not cfg.hf_hub_id, f"{model} has a default tag that is not in the wheel"


def test_a_wrong_hash_in_the_manifest_is_noticed(set_manifest, offline):
    entries = published_manifest()
    entries[BUNDLED]["sha256"] = "0" * 64
    set_manifest(entries)
    with pytest.raises(ValueError, match=rf"weights of {BUNDLED} are corrupt: .* has sha256 .*, not 0000"):
        timm.create_model(BUNDLED, pretrained=True)


@pytest.mark.filterwarnings("ignore:no published hash")
def test_the_authors_alexnet_from_its_release(reference, hub, set_manifest):
    """An archive of the size and form of the real one, served over loopback, gives every layer's expected output."""
    entries = published_manifest()
    with Release(reference) as server:
        entries["rotnet_alexnet.gidaris_in1k"]["url"] = f"{server.url}/ImageNet_RotNet_AlexNet.tar.gz"
        set_manifest(entries)
        model = timm.create_model("rotnet_alexnet.gidaris_in1k", pretrained=True).eval()
    expected = load_file(reference / "expected.safetensors")
    with torch.inference_mode():
        _, maps = model.forward_intermediates(expected["alexnet.input"])
        logits = model(expected["alexnet.input"])
    for name, output in (*((f"conv{i}", feature_map) for i, feature_map in enumerate(maps, 1)), ("classifier", logits)):
        torch.testing.assert_close(output, expected[f"alexnet.{name}"], rtol=1e-4, atol=1e-4)
    # and with a head of one's own, from the cache
    tuned = timm.create_model("rotnet_alexnet.gidaris_in1k", pretrained=True, num_classes=20)
    assert torch.equal(tuned.head.fc6[0].weight, model.head.fc6[0].weight) and tuned.head.fc.out_features == 20
