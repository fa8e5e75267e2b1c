"""How published weights get to the Hugging Face Hub whole.

A revision exists only after the upload, so the order is: check the card, create, upload what differs, read the
revision, download it again and compare, tag it, and only then write it into the manifest. Each step finds out what is
done already: run again, it goes on where it was interrupted, and uploads nothing that is there.
"""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load

import rotation_ssl
from rotation_ssl.messages import first_line, is_connection_error
from rotation_ssl.zoo.golden import GOLDEN_TOLERANCE
from training.reporting.hub.files import GOLDEN, ONNX, hub_files
from training.reporting.hub.weights import WEIGHTS, Upload
from training.reporting.pages import REPOSITORY
from training.reporting.rows import Row


def publish(upload: Upload, namespace: str, version: str, rows: Sequence[Row]) -> dict[str, str]:
    """Bring weights to the Hub and verify them there; returns what the manifest is to say of it.

    Nothing is uploaded that is there already; the version's tag is set once and never moved.

    Raises:
        OSError: the Hub cannot be reached, or refuses (no login, no permission, a commit in between).
        ValueError: it serves other bytes than were uploaded, the version's tag is at another revision, this project has
            no public address for the card to point to, or onnxruntime is not installed.
    """
    if REPOSITORY.startswith("OWNER/"):
        raise ValueError(
            "cards on the Hub point to this project's public address: set REPOSITORY in training/reporting/pages.py"
        )
    if find_spec("onnxruntime") is None:
        raise ValueError("the upload compares ONNX files with onnxruntime: pip install -e '.[onnx]'")
    repository = f"{namespace}/{upload.name}"
    files, api = hub_files(upload, repository, version, rows), HfApi()
    try:
        _check_card(repository, files["README.md"].decode())
        api.create_repo(repository, exist_ok=True)
        revision = _revision(api, repository, version)
        if revision is not None:
            _keep_equal(repository, revision, files)
            if changed := _differing(repository, revision, files):
                raise ValueError(
                    f"{version} of {repository} has other {', '.join(changed)}, and a version never moves: raise it"
                    " (--version)"
                )
        else:
            head = _revision(api, repository, "main")
            assert head is not None
            _keep_equal(repository, head, files)
            # the client leaves out what is there already
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            message = f"{upload.name} {version}"
            revision = api.create_commit(repository, operations, commit_message=message, parent_commit=head).oid
            if changed := _differing(repository, revision, files):
                raise ValueError(
                    f"{', '.join(changed)} of {repository}@{revision} is not what was uploaded: nothing was published"
                )
        api.create_tag(repository, tag=version, revision=revision, exist_ok=True)
        tagged = api.model_info(repository, revision=version).sha
    except HfHubHTTPError as error:
        raise ConnectionError(f"publishing {repository} failed: {_reason(error)}; run it again") from error
    except RuntimeError as error:
        # an upload of a large file that failed
        cause = error.__cause__
        reason = _reason(cause) if isinstance(cause, HfHubHTTPError) else first_line(cause or error)
        raise ConnectionError(f"publishing {repository} failed: {reason}; run it again") from error
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise ConnectionError(
            f"publishing {repository} failed: no connection ({first_line(error)}); run it again"
        ) from error
    if tagged != revision:
        raise ValueError(
            f"{version} of {repository} is revision {tagged}, not {revision}: someone else set it meanwhile"
        )
    return {"repository": repository, "revision": revision, "version": version, "file": WEIGHTS}


def current_version() -> str:
    """The Hub tag of this version of the package: 'v0.1' for 0.1.2."""
    return "v" + ".".join(rotation_ssl.__version__.split(".")[:2])


def _revision(api: HfApi, repository: str, name: str) -> str | None:
    """The revision of a branch or tag, None when there is none."""
    try:
        return api.model_info(repository, revision=name).sha
    except RevisionNotFoundError:
        return None


def _check_card(repository: str, text: str) -> None:
    """Let the Hub check a card before anything is created."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        raise ValueError(f"the Hub refuses the card of {repository}: {' '.join(str(error).split())}") from error


def _keep_equal(repository: str, revision: str, files: dict[str, bytes]) -> None:
    """Take over the golden outputs and the ONNX file of a revision where they agree with ours.

    Those of another machine differ by rounding, those of another version of the exporter by names.
    """
    import onnxruntime

    golden = load(files[GOLDEN])
    if served := _served(repository, revision, GOLDEN):
        theirs = load(served)
        if golden.keys() == theirs.keys() and all(_close(golden[key], theirs[key]) for key in golden):
            files[GOLDEN] = served
    if served := _served(repository, revision, ONNX):
        session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": golden["input"].numpy()})
        if _close(golden["logits"], torch.from_numpy(logits)):
            files[ONNX] = served


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < GOLDEN_TOLERANCE)


def _differing(repository: str, revision: str, files: dict[str, bytes]) -> list[str]:
    """The files whose content at a revision of the Hub is another."""
    return [path for path, content in files.items() if _served(repository, revision, path) != content]


def _served(repository: str, revision: str, path: str) -> bytes | None:
    """A file's content as the Hub serves it now, None where it has no such file."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(hf_hub_download(repository, path, revision=revision, cache_dir=folder)).read_bytes()
        except LocalEntryNotFoundError:
            raise  # a lost connection, though it is an EntryNotFoundError too
        except EntryNotFoundError:
            return None


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    told = {
        401: "the Hub wants a login: `hf auth login`, or HF_TOKEN",
        403: "no permission to write there",
        412: "someone else committed meanwhile",
    }
    if isinstance(error, RepositoryNotFoundError) and status != 404:
        return told[401]
    return told.get(status or 0) or first_line(error)
