"""The documentation site: `make docs` builds it into build/docs.

The source directory is the root of the repository, so that links between pages are the same here and in the repository.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import rotation_ssl  # noqa: E402  of this clone, wherever another one is installed

TRY_PAGE = ROOT / "build" / "page"  # `make page` builds it

# README.md is the first page; the groups of the other pages, and what they are called in the sidebar
NAVIGATION = {
    "Getting started": {
        "All pages": "docs/index",
        "Load weights": "docs/loading",
        "A first notebook": "docs/notebook",
        "Integrations": "docs/integrations",
    },
    "Features and evaluation": {
        "Features and probes": "docs/features",
        "Millions of images": "docs/scale",
        "Results": "docs/results",
        "AlexNet on ImageNet": "docs/imagenet",
        "Transfer to PASCAL VOC": "docs/transfer",
    },
    "Pretraining": {
        "Pretrain on your own images": "docs/pretraining",
        "Reproduce the results": "docs/reproduce",
        "How nin-cifar10-cpu was chosen": "training/studies/nin_cifar10",
        "Small networks for orientation": "training/studies/networks",
    },
    "Applications": {
        "Turn photographs upright": "docs/orientation",
        "Photographs in the browser": "docs/try/README",
        "Find outliers": "docs/outliers",
    },
    "Reference": {
        "API reference": "docs/api/index",
        "Model card": "MODEL_CARD",
        "Reliability": "docs/reliability",
        "Changelog": "CHANGELOG",
        "Contributing": "CONTRIBUTING",
        "Security": "SECURITY",
        "Licences of the sample images": "rotation_ssl/samples/LICENSES",
    },
}

project = "rotation_ssl"
version = release = rotation_ssl.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/**", "rotation_ssl/samples/*.md", "training/studies/*.md"]
exclude_patterns = ["build", "data", "runs", ".*", "**/.*", "**/node_modules"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "markdown"}

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_custom_sections = [("Weights", "params_style")]
nitpicky = True
# names of other projects, whose pages are not downloaded
nitpick_ignore_regex = [("py:class", r"(collections|numpy|pathlib|PIL|timm|torch)\..*")]

highlight_language = "none"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
templates_path = ["site/templates"]
html_extra_path = ["site/root"]
html_copy_source = False
html_show_copyright = False
html_context = {"has_try_page": TRY_PAGE.is_dir()}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "try.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}


def prepare_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """What a page is on the site, where that differs from its file in the repository."""
    text = source[0]
    if docname == "docs/notebook":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        text = "\n\n".join(f"```python\n{code}\n```" if kind == "code" else code for kind, code in cells)
        text += "\n\n{download}`Download this notebook <notebook.ipynb>`\n"
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            lines = "\n".join(f"{title} </{page}>" for title, page in pages.items())
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"
    # a link shows the page's title, not its file name
    source[0] = re.sub(r"\[[\w/]+\.md\]\(", "[](", text)


def copy_try_page(app: Sphinx, exception: Exception | None) -> None:
    """Put the page that runs the models in a browser next to the others."""
    if exception is None and TRY_PAGE.is_dir():
        shutil.copytree(TRY_PAGE, app.outdir / "try", dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare_source)
    app.connect("build-finished", copy_try_page)
