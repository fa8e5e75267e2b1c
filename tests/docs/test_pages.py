"""What README and the pages of docs/ tell people to type exists."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from rotation_ssl import cli
from training.__main__ import COMMANDS, main

# the heads of the commands' files are what --help prints
HEADS = [file for file in (ROOT / "training").rglob("*.py") if "python -m training" in file.read_text()]
PAGES = [
    ROOT / "README.md",
    ROOT / "MODEL_CARD.md",
    *sorted((ROOT / "training" / "studies").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TYPED = [
    (page.name, command, rest.split("`")[0])
    for page in (*PAGES, *HEADS)
    for command, rest in re.findall(r"-m training ([a-z][a-z-]*)(.*)", page.read_text().replace("\\\n", " "))
]


def test_the_lab_lists_its_commands(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(
        re.search(rf"^  {command} +{re.escape(what)}$", told, re.MULTILINE) for command, (_, what) in COMMANDS.items()
    )
    assert main(["prettrain"]) == 2 and "no command 'prettrain'; there are pretrain, " in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "pretrain", ("not_installed.pretrain", ""))
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == "error: pretrain needs not_installed: pip install -e '.[train]'\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_command(command, capsys):
    told = ""
    for words in (
        [],
        *([[name] for name in ("bundle", "figures", "render", "upload")] if command == "publish" else []),
    ):
        with pytest.raises(SystemExit) as left:
            main([command, *words, "--help"])
        assert left.value.code == 0
        # without the head, which names options whether or not there are such
        head = importlib.import_module(COMMANDS[command][0]).__doc__.strip()
        told += capsys.readouterr().out.replace(head, "")
    for page, rest in [(page, rest) for page, other, rest in TYPED if other == command]:
        for option in re.findall(r"--[a-z][a-z0-9-]*", rest):
            assert re.search(rf"{option}\b", told), f"{page}: {command} has no {option}"


def test_every_command_that_is_told_is_there():
    assert {command for _, command, _ in TYPED} <= set(COMMANDS)


def test_every_line_of_the_command_is_one_that_it_takes(monkeypatch):
    for command in cli.COMMANDS:
        monkeypatch.setattr(command, "run", lambda args: 0)
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    lines = [line for text in texts for line in re.findall(r"^rotation-ssl (.*)$", text, re.MULTILINE)]
    assert len(lines) > 20
    for line in lines:
        assert cli.main(shlex.split(line, comments=True)) == 0, line


def test_every_page_that_has_commands_is_read():
    pages = {
        "README.md",
        "MODEL_CARD.md",
        "nin_cifar10.md",
        "networks.md",
        "features.md",
        "imagenet.md",
        "loading.md",
        "reproduce.md",
        "transfer.md",
    }
    assert {page for page, _, _ in TYPED if page.endswith(".md")} >= pages


def test_the_tests_that_keep_a_promise_are_there():
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    named = [re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", row) for row in promises]
    assert len(promises) > 30 and all(named), "a promise without a test"
    for file, test in (pair for pairs in named for pair in pairs):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"
