"""What README and the pages of docs/ tell people to type exists."""

import importlib
import re

import pytest
from conftest import ROOT

# the heads of the commands' files are what --help prints
HEADS = [file for file in (ROOT / "training").glob("*.py") if "python -m training" in file.read_text()]
PAGES = [
    ROOT / "README.md",
    ROOT / "MODEL_CARD.md",
    ROOT / "training" / "STUDY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = [
    (page.name, module, rest.split("`")[0])
    for page in (*PAGES, *HEADS)
    for module, rest in re.findall(r"python -m (training\.[a-z_]+)(.*)", page.read_text().replace("\\\n", " "))
]


@pytest.mark.parametrize("module", sorted({module for _, module, _ in COMMANDS}))
def test_options_are_those_of_the_command(module, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    for page, rest in [(page, rest) for page, other, rest in COMMANDS if other == module]:
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert re.search(rf"{option}\b", told), f"{page}: {module} has no {option}"


def test_every_page_that_has_commands_is_read():
    pages = {"README.md", "MODEL_CARD.md", "STUDY.md", "imagenet.md", "loading.md", "pretraining.md", "transfer.md"}
    assert {page for page, _, _ in COMMANDS if page.endswith(".md")} >= pages
