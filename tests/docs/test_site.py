"""The documentation site builds without a warning or a network, has every public name, and no link in it is dead."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
from conftest import MODELS, ROOT

import hubconf
import rotation_ssl

# modules that are not part of the interface, with all below them. A new one is public unless it is named here, or is in
# a package whose __all__ says what is public
INTERNAL = {
    "rotation_ssl.backbones.about",
    "rotation_ssl.cli",
    "rotation_ssl.demo",
    "rotation_ssl.evaluation.fresh",
    "rotation_ssl.evaluation.frozen",
    "rotation_ssl.evaluation.measure",
    "rotation_ssl.evaluation.report",
    "rotation_ssl.files",
    "rotation_ssl.fit",
    "rotation_ssl.machine",
    "rotation_ssl.messages",
    "rotation_ssl.models",
    "rotation_ssl.precision",
    "rotation_ssl.pretraining",
    "rotation_ssl.progress",
}
PUBLIC_BELOW = {"rotation_ssl.pretraining.recipe"}
OFFLINE = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"the network was used: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def sphinx(source, output, *options):
    command = [sys.executable, "-c", OFFLINE, "--quiet", "--fail-on-warning", "--keep-going", *options]
    return subprocess.run([*command, str(source), str(output)], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = sphinx(ROOT, folder / "html", "-c", str(ROOT / "docs"), "-d", str(folder / "doctrees"))
    assert built.returncode == 0 and not built.stderr, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def documented(site):
    # four lines of text, then lines of "name domain:kind ..."
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    return {entry.split()[0] for entry in entries if entry.split()[1].startswith("py:")}


class Page(HTMLParser):
    """The anchors of a page and what it links to, by tag."""

    def __init__(self, file):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.links += [(tag, attrs[name]) for name in ("href", "src") if attrs.get(name)]


def read_pages(folder):
    return {file: Page(file) for file in folder.rglob("*.html")}


def dead_links(pages):
    dead = []
    for file, page in pages.items():
        for _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                dead.append(f"{file.name}: {link}")
    return dead


def external(pages):
    """What a page would load from elsewhere, and not only link to."""
    return [
        link for page in pages.values() for tag, link in page.links if tag != "a" and re.match("(https?:)?//", link)
    ]


def is_public(module):
    parts = module.split(".")
    packages = {".".join(parts[:count]) for count in range(2, len(parts))}
    spoken_for = any(hasattr(importlib.import_module(package), "__all__") for package in packages)
    return module in PUBLIC_BELOW or not (spoken_for or (packages | {module}) & INTERNAL)


def public_names():
    found = [module.name for module in pkgutil.walk_packages(rotation_ssl.__path__, "rotation_ssl.")]
    modules = ["rotation_ssl", *filter(is_public, found)]
    return {f"{name}.{own}" for name in modules for own in names_of(importlib.import_module(name))}


def names_of(module):
    if hasattr(module, "__all__"):
        return list(module.__all__)
    members = inspect.getmembers(module, lambda member: inspect.isfunction(member) or inspect.isclass(member))
    return [name for name, member in members if member.__module__ == module.__name__ and not name.startswith("_")]


def resolve(name):
    """What a full name is the name of; AttributeError where there is nothing."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(".".join(parts[:count]))
            return functools.reduce(getattr, parts[count:], module)
    raise AttributeError(name)


def undocumented(names, documented):
    """Names that no page has, neither as they are nor as another name of the same function or class."""
    objects = [resolve(name) for name in documented]
    return {
        name
        for name in names - documented
        if not callable(resolve(name)) or not any(resolve(name) is other for other in objects)
    }


@pytest.mark.slow
def test_every_public_name_is_documented(documented):
    names = public_names()
    assert {f"rotation_ssl.{name}" for name in rotation_ssl.__all__} <= documented
    assert {"rotation_ssl.features.extract_features", "rotation_ssl.zoo.WEIGHTS_DIR"} <= names
    assert undocumented(names, documented) == set()


@pytest.mark.slow
def test_every_name_that_is_documented_is_there(documented):
    assert len(documented) > 100 and all(resolve(name) is not None for name in documented)


@pytest.mark.slow
def test_every_model_is_documented(documented):
    assert {name for name in vars(hubconf) if name.startswith("rotnet_")} == set(MODELS)
    for name in MODELS:
        entry = timm.models.model_entrypoint(name)
        assert {f"rotation_ssl.hub.{name}", f"{entry.__module__}.{name}"} <= documented


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotation_ssl.features.rankme", "rotation_ssl.convert.AUTHORS"])
def test_a_name_that_no_page_has_is_found(name, documented):
    assert undocumented(public_names(), documented - {name}) == {name}


@pytest.mark.slow
def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site):
    pages = read_pages(site)
    assert len(pages) > 30 and sum(len(page.links) for page in pages.values()) > 1000
    assert dead_links(pages) == []
    assert external(pages) == []
    for file in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", file.read_text()), file


def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"></a><a href="b.html#there"></a><a href="https://example.org"></a>'
        '<a href="b.html#gone"></a><a href="gone.html"></a><a href="#gone"></a><img src="gone.png">'
        '<script src="https://example.org/x.js"></script><link rel="stylesheet" href="//example.org/x.css">'
    )
    (tmp_path / "b.html").write_text('<p id="there">')
    pages = read_pages(tmp_path)
    assert dead_links(pages) == ["a.html: b.html#gone", "a.html: gone.html", "a.html: #gone", "a.html: gone.png"]
    assert external(pages) == ["https://example.org/x.js", "//example.org/x.css"]


@pytest.mark.slow
def test_every_figure_is_shown(site):
    figures = {file.name for file in (ROOT / "docs" / "figures").iterdir()}
    shown = {Path(link).name for page in read_pages(site).values() for tag, link in page.links if tag == "img"}
    assert figures and figures <= shown


@pytest.mark.slow
def test_the_first_page_is_where_the_address_leads(site):
    assert 'url=README.html"' in (site / "index.html").read_text() and (site / "README.html").is_file()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """The build of a copy with dead links, a page outside of the navigation, and the page that runs in a browser."""
    copy = tmp_path_factory.mktemp("spoilt")
    for file in (*ROOT.glob("*.md"), *ROOT.glob("LICENSE"), *ROOT.glob("*.cff")):
        shutil.copy(file, copy)
    for folder in ("docs", "rotation_ssl/samples", "training/studies"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("node_modules"))
    page = copy / "docs" / "outliers.md"
    page.write_text(page.read_text() + "\n[a](nowhere.md) [b](loading.md#nowhere) [c](#nowhere)\n")
    (copy / "docs" / "lonely.md").write_text("# Lonely\n")
    (copy / "build" / "page").mkdir(parents=True)
    (copy / "build" / "page" / "index.html").write_text("<title>Try it</title>")
    return copy / "html", sphinx(copy, copy / "html", "-c", str(copy / "docs"))


@pytest.mark.slow
def test_a_dead_link_or_a_page_outside_of_the_navigation_fails_the_build(spoilt):
    _, built = spoilt
    warned = sorted(re.findall(r"(\w+\.md)(?::\d+)?: WARNING:", built.stderr))
    assert built.returncode == 1 and warned == ["lonely.md", *["outliers.md"] * 3], built.stderr


@pytest.mark.slow
def test_the_page_that_runs_in_a_browser_is_part_of_the_site(spoilt):
    html, _ = spoilt
    pages = read_pages(html)
    for page, link in (("README.html", "try/index.html"), ("docs/api/index.html", "../../try/index.html")):
        assert ("a", link) in pages[html / page].links
    assert not [link for link in dead_links(pages) if "try/index.html" in link]
