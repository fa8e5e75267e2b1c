"""README, MODEL_CARD and pages of docs/: their Python snippets run, in their order, and their links lead somewhere."""

import re

import pytest
import timm
from conftest import ROOT
from safetensors.torch import save_file

from rotation_ssl import cli

SNIPPETS = ("loading", "features", "orientation", "outliers", "scale")


@pytest.mark.parametrize(
    "page",
    ["README.md", "MODEL_CARD.md", *(f"docs/{page}.md" for page in SNIPPETS)],
)
def test_every_snippet_runs(page, monkeypatch, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets and not (page == "README.md" and "OWNER" in "".join(snippets))
    save_file(timm.create_model("rotnet_nin").state_dict(), tmp_path / "mine.safetensors")
    assert (
        cli.main(["features", str(ROOT / "rotation_ssl" / "samples" / "photos"), "-o", str(tmp_path / "f.safetensors")])
        == 0
    )
    files = {
        "mine.safetensors": tmp_path / "mine.safetensors",
        "features.safetensors": tmp_path / "f.safetensors",
        "MY_IMAGES": ROOT / "rotation_ssl" / "samples" / "photos",
        "NORMAL_IMAGES": ROOT / "rotation_ssl" / "samples" / "photos",
        "MY_FEATURES": tmp_path / "parts",
        "photo.jpg": ROOT / "rotation_ssl" / "samples" / "photos" / "china.jpg",
    }
    # torch.hub loads "." from a clone
    monkeypatch.chdir(ROOT)
    for snippet in (snippet for snippet in snippets if "OWNER" not in snippet):
        for name, file in files.items():
            snippet = snippet.replace(f'"{name}"', repr(str(file)))
        exec(compile(snippet, page, "exec"), {})


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "MODEL_CARD.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["index.md"]


def test_the_readme_is_short_and_has_no_placeholder():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and not re.search("OWNER|COMMIT", text)
