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
    command = importlib.import_module(module)
    told = ""
    for words in ([], *([[name] for name in ("bundle", "figures", "render")] if module == "training.publish" else [])):
        with pytest.raises(SystemExit) as left:
            command.main([*words, "--help"])
        assert left.value.code == 0
        # without the head, which names options whether or not there are such
        told += capsys.readouterr().out.replace(command.__doc__.strip(), "")
    for page, rest in [(page, rest) for page, other, rest in COMMANDS if other == module]:
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert re.search(rf"{option}\b", told), f"{page}: {module} has no {option}"


def test_every_page_that_has_commands_is_read():
    pages = {"README.md", "MODEL_CARD.md", "STUDY.md", "imagenet.md", "loading.md", "pretraining.md", "transfer.md"}
    assert {page for page, _, _ in COMMANDS if page.endswith(".md")} >= pages


def test_the_tests_that_keep_a_promise_are_there():
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    named = [re.findall(r"`(tests/\w+\.py)::(\w+)`", row) for row in promises]
    assert len(promises) > 30 and all(named), "a promise without a test"
    for file, test in (pair for pairs in named for pair in pairs):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"
