"""The house rules that reading alone would forget: imports go one way, names are the documented ones."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import rotation_ssl

# from the foundation to the roof: a module imports from its own layer and from those before it, never from a later one.
# A module is of the layer that names it, or the longest package around it.
LAYERS = (
    # the library: tensors and files in, tensors out
    {"rotation_ssl.messages", "rotation_ssl.files", "rotation_ssl.progress", "rotation_ssl.precision"},
    {"rotation_ssl.backbones.about"},
    {"rotation_ssl.fit"},
    {"rotation_ssl.rotations", "rotation_ssl.features", "rotation_ssl.probes", "rotation_ssl.images"},
    {"rotation_ssl.eighths", "rotation_ssl.labelled", "rotation_ssl.shards"},
    {"rotation_ssl.convert"},
    {"rotation_ssl.zoo"},
    {"rotation_ssl.backbones"},
    {"rotation_ssl.pretraining"},
    {"rotation_ssl"},
    {"rotation_ssl.machine"},
    {
        "rotation_ssl.pretraining.recipe",
        "rotation_ssl.pretraining.augment",
        "rotation_ssl.pretraining.optim",
        "rotation_ssl.pretraining.images",
        "rotation_ssl.pretraining.shards",
        "rotation_ssl.pretraining.state",
        "rotation_ssl.pretraining.options",
    },
    {
        "rotation_ssl.pretraining.batches",
        "rotation_ssl.pretraining.setup",
        "rotation_ssl.pretraining.outputs",
        "rotation_ssl.pretraining.run",
        "rotation_ssl.pretraining.monitor",
    },
    {"rotation_ssl.orientation"},
    {"rotation_ssl.models", "rotation_ssl.embedding.files"},
    {"rotation_ssl.embedding.sources", "rotation_ssl.embedding.parts"},
    {"rotation_ssl.embedding.local", "rotation_ssl.embedding.reading"},
    {"rotation_ssl.embedding.cluster", "rotation_ssl.embedding.neighbours"},
    {"rotation_ssl.embedding"},
    {"rotation_ssl.evaluation", "rotation_ssl.outliers"},
    {"rotation_ssl.pretraining.loop"},
    {"rotation_ssl.pretraining.command"},
    {"rotation_ssl.hub", "rotation_ssl.demo", "rotation_ssl.cli"},
    {"hubconf"},
    # the lab
    {
        "training",
        "training.recipes",
        "training.photos",
        "training.datasets",
        "training.evaluation.recipes",
        "training.transfer.recipes",
    },
    {
        "training.reporting.rows",
        "training.reporting.report",
        "training.reporting.manifest",
        "training.reporting.required",
    },
    {"training.pretrain"},
    {"training.evaluation"},
    {"training.transfer"},
    {"training.reporting"},
    {"training.studies"},
    {"training.reporting.publish"},
    {"training.__main__"},
)
# imported when something is trained: it needs an extra
DOORS = {("rotation_ssl.pretraining", "rotation_ssl.pretraining.command")}
# they meet in whoever uses them, and know nothing of each other
INDEPENDENT = {"rotation_ssl.rotations", "rotation_ssl.features", "rotation_ssl.probes", "rotation_ssl.images"}
FILES = [ROOT / "hubconf.py", *(ROOT / "rotation_ssl").rglob("*.py"), *(ROOT / "training").rglob("*.py")]


def module_name(file):
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


MODULES = {module_name(file): file for file in FILES}


def layer_of(module):
    parts = module.split(".")
    packages = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(rank for name in packages for rank, layer in enumerate(LAYERS) if name in layer)


def own_imports(module):
    """The project's modules that a module imports."""
    own = {name for name in imported(MODULES[module]) if name.split(".")[0] in ("rotation_ssl", "training", "hubconf")}
    return {name for name in own if (module, name) not in DOORS}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for name in own_imports(module):
        assert layer_of(name) <= layer_of(module), f"{name} is of a later layer than {module}"
        assert not (module in INDEPENDENT and name in INDEPENDENT), f"{module} knows {name}"


def test_no_import_comes_back():
    order = graphlib.TopologicalSorter({module: own_imports(module) - {module} for module in MODULES})
    assert set(order.static_order()) >= set(MODULES), "graphlib raises CycleError where there is one"


def test_every_layer_names_what_is_there():
    for name in set().union(*LAYERS):
        assert name in MODULES, f"{name} is no module any more"


def test_recipes_know_no_torch():
    for file in ("rotation_ssl/pretraining/recipe.py", "training/recipes.py"):
        assert not {name.split(".")[0] for name in imported(ROOT / file)} & {"torch", "timm", "numpy"}


def test_no_room_for_odds_and_ends():
    assert not [f for f in FILES if f.stem in ("utils", "common", "misc", "helpers")]


def test_the_pretext_task_is_one_screen_of_code():
    tree = ast.parse((ROOT / "rotation_ssl" / "rotations.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert body[-1].end_lineno - body[0].lineno < 20, function.name


def test_public_names_are_the_documented_ones():
    assert rotation_ssl.__all__ == ["pretrain", "rotate_all", "rotation_labels", "rotation_loss"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", rotation_ssl.__version__)


def test_importing_changes_nothing_and_loads_no_training():
    code = (
        "import os, sys, torch, timm\n"
        "before = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()\n"
        "timms = {name.split('.')[0] for name in sys.modules}\n"
        "import rotation_ssl.cli\n"
        "assert before == (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype())\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'training', 'sklearn', 'matplotlib', 'accelerate', 'tests'}, loaded\n"
        # importing timm takes seconds, for the models must be registered with it: nothing else shall take any
        "assert loaded - timms - sys.stdlib_module_names == {'rotation_ssl'}, loaded - timms\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
