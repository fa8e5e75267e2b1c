"""The house rules that reading alone would forget: imports go one way, names are the documented ones."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import rotation_ssl

VOC_COMMAND = {
    f"training.{name}"
    for name in ("memory", "progress", "protocols", "report", "results", "subject", "transfer", "voc_command")
} | {
    "training.voc_data",
    "training.voc_metrics",
}
# what each module may import of the project; a module that is not here has no place in the plan yet
ALLOWED = {
    "rotation_ssl": {f"rotation_ssl.backbones.{name}" for name in ("alexnet", "nin", "resnets")}
    | {"rotation_ssl.rotations"},
    "rotation_ssl.rotations": set(),
    "rotation_ssl.features": set(),
    "rotation_ssl.probes": set(),
    "rotation_ssl.images": set(),
    "rotation_ssl.checkpoints": set(),
    "rotation_ssl.convert": set(),
    "rotation_ssl.download": {"rotation_ssl.checkpoints"},
    "rotation_ssl.sources": {f"rotation_ssl.{n}" for n in ("checkpoints", "convert", "download")},
    "rotation_ssl.zoo": {"rotation_ssl.sources"},
    "rotation_ssl.golden": {"rotation_ssl.zoo", "rotation_ssl.features", "rotation_ssl.images"},
    "rotation_ssl.backbones": set(),
    "rotation_ssl.backbones.nin": {"rotation_ssl.zoo"},
    "rotation_ssl.backbones.alexnet": {"rotation_ssl.zoo"},
    "rotation_ssl.backbones.resnets": {"rotation_ssl.zoo"},
    "rotation_ssl.hub": {"rotation_ssl.zoo"}
    | {f"rotation_ssl.backbones.{name}" for name in ("alexnet", "nin", "resnets")},
    "rotation_ssl.demo": {"rotation_ssl", "rotation_ssl.features", "rotation_ssl.images"},
    "rotation_ssl.cli": {"rotation_ssl"}
    | {f"rotation_ssl.cli.{n}" for n in ("convert", "features", "fetch", "info", "list", "options", "verify")},
    "rotation_ssl.cli.__main__": {"rotation_ssl.cli"},
    "rotation_ssl.cli.options": {"rotation_ssl.zoo"},
    "rotation_ssl.cli.list": {"rotation_ssl.zoo", "rotation_ssl.cli.info", "rotation_ssl.cli.options"},
    "rotation_ssl.cli.info": {"rotation_ssl.sources", "rotation_ssl.zoo", "rotation_ssl.cli.options"},
    "rotation_ssl.cli.fetch": {"rotation_ssl.sources", "rotation_ssl.zoo", "rotation_ssl.cli.options"},
    "rotation_ssl.cli.verify": {f"rotation_ssl.{n}" for n in ("checkpoints", "golden", "sources", "zoo")}
    | {"rotation_ssl.cli.options"},
    "rotation_ssl.cli.convert": {"rotation_ssl", "rotation_ssl.cli.options"}
    | {f"rotation_ssl.{n}" for n in ("checkpoints", "convert", "sources")},
    "rotation_ssl.cli.features": {f"rotation_ssl.{n}" for n in ("features", "images", "sources", "zoo")}
    | {"rotation_ssl.cli.options"},
    "hubconf": {"rotation_ssl.hub"},
    "training": set(),
    "training.memory": set(),
    "training.recipes": set(),
    "training.protocols": {"training.recipes"},
    "training.precision": {"training.protocols", "training.recipes"},
    "training.progress": set(),
    "training.eighths": {"rotation_ssl.rotations"},
    "training.optimizers": {"training.recipes"},
    "training.data": {"rotation_ssl.images"},
    "training.augment": set(),
    "training.unlabelled": {"rotation_ssl.images", "training.data", "training.memory"},
    "training.checkpoint": {"rotation_ssl.sources"},
    "training.batches": {"rotation_ssl.images", "training.augment", "training.recipes", "training.unlabelled"},
    "training.outputs": {"rotation_ssl.convert", "training.checkpoint", "training.recipes", "training.results"},
    "training.speed": {"rotation_ssl"}
    | {f"rotation_ssl.{name}" for name in ("features", "images", "rotations")}
    | {
        f"training.{name}"
        for name in ("batches", "memory", "optimizers", "precision", "pretrain", "recipes", "results")
    },
    "training.benchmark": {"rotation_ssl.zoo", "rotation_ssl.backbones.nin"}
    | {f"training.{name}" for name in ("card", "results", "speed")},
    "training.results": {"rotation_ssl"},
    "training.pretrain": {"training.augment"}
    | {"rotation_ssl", "rotation_ssl.images", "rotation_ssl.rotations"}
    | {
        f"training.{name}"
        for name in ("batches", "checkpoint", "eighths", "memory", "optimizers", "outputs", "recipes", "results")
    }
    | {"training.augment", "training.precision", "training.unlabelled"},
    "training.subject": {"rotation_ssl", "rotation_ssl.images", "rotation_ssl.zoo", "training.results"},
    "training.report": {"training.memory", "training.results"},
    "training.evaluate": {f"rotation_ssl.{name}" for name in ("features", "probes", "rotations")}
    | {f"training.{name}" for name in ("augment", "memory", "data", "protocols", "report", "results", "subject")}
    | {"training.precision", "training.progress"},
    "training.finetune": {f"rotation_ssl.{name}" for name in ("zoo", "features", "probes")}
    | {
        f"training.{name}"
        for name in ("augment", "memory", "data", "optimizers", "protocols", "report", "results", "subject")
    }
    | {"training.precision", "training.progress"},
    "training.check": {"rotation_ssl.zoo", "rotation_ssl.features", "rotation_ssl.golden"}
    | {
        f"training.{n}"
        for n in ("memory", "data", "evaluate", "finetune", "imagenet", "progress", "protocols", "results", "subject")
    },
    "training.measure": {"rotation_ssl.zoo", "rotation_ssl.features"}
    | {f"training.{n}" for n in ("check", "data", "memory", "progress", "report", "results")},
    "training.ablation": {f"training.{n}" for n in ("data", "evaluate", "memory", "pretrain", "recipes")}
    | {f"training.{n}" for n in ("precision", "progress", "report", "results", "subject")},
    "training.study": {f"training.{n}" for n in ("card", "data", "evaluate", "figures", "memory")}
    | {f"training.{n}" for n in ("precision", "pretrain", "progress", "recipes", "report", "results", "subject")},
    "training.imagenet": {f"rotation_ssl.{name}" for name in ("features", "images", "probes")}
    | {
        f"training.{name}"
        for name in ("augment", "data", "memory", "protocols", "report", "results", "subject", "unlabelled")
    }
    | {"training.precision", "training.progress"},
    "training.figures": {"rotation_ssl.features", "rotation_ssl.images", "training.results"},
    "training.card": {"training.recipes", "training.report", "training.results"},
    "training.publish": {f"rotation_ssl.{name}" for name in ("zoo", "features", "golden", "images")}
    | {f"training.{name}" for name in ("card", "data", "figures", "recipes", "results", "upload")},
    "training.upload": {"rotation_ssl", "training.card", "training.results"}
    | {f"rotation_ssl.{name}" for name in ("convert", "features", "golden", "zoo")},
    "training.rescale": set(),
    "training.transfer": {"rotation_ssl.backbones.alexnet", "rotation_ssl.images"}
    | {f"training.{name}" for name in ("optimizers", "progress", "protocols", "rescale", "subject", "voc_data")},
    "training.voc_command": {f"training.{name}" for name in ("protocols", "report", "results", "subject", "transfer")}
    | {"training.voc_data", "training.voc_metrics"},
    "training.alexnet_costs": {"rotation_ssl"}
    | {f"training.{name}" for name in ("imagenet", "protocols", "recipes", "results", "subject")},
    "training.segment": {"rotation_ssl.backbones.alexnet", "rotation_ssl.images"} | VOC_COMMAND,
    "training.detect": VOC_COMMAND,
    "training.voc": VOC_COMMAND,
    "training.voc_metrics": set(),
    "training.voc_data": {"training.voc_metrics"},
}
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
                yield submodule if submodule in ALLOWED else node.module


def test_every_module_has_its_place():
    assert {module_name(file) for file in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_one_way(file):
    ours = {name for name in imported(file) if name.split(".")[0] in ("rotation_ssl", "training", "tests", "hubconf")}
    assert ours <= ALLOWED[module_name(file)], "an import that the plan does not have"


def test_recipes_know_no_torch():
    assert not {name.split(".")[0] for name in imported(ROOT / "training" / "recipes.py")} & {"torch", "timm", "numpy"}


def test_no_room_for_odds_and_ends():
    assert not [f for f in FILES if f.stem in ("utils", "common", "misc", "helpers")]


def test_the_pretext_task_is_one_screen_of_code():
    tree = ast.parse((ROOT / "rotation_ssl" / "rotations.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert body[-1].end_lineno - body[0].lineno < 20, function.name


def test_public_names_are_the_documented_ones():
    assert rotation_ssl.__all__ == ["rotate_all", "rotation_labels", "rotation_loss"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", rotation_ssl.__version__)


def test_importing_changes_nothing_and_loads_no_training():
    code = (
        "import os, sys, torch, timm\n"
        "before = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()\n"
        "timms = {name.split('.')[0] for name in sys.modules}\n"
        "import rotation_ssl.cli\n"
        "assert before == (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype())\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'training', 'sklearn', 'matplotlib', 'tests'}, loaded\n"
        # importing timm takes seconds, for the models must be registered with it: nothing else shall take any
        "assert loaded - timms - sys.stdlib_module_names == {'rotation_ssl'}, loaded - timms\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_readme_snippets_are_real(monkeypatch, tmp_path):
    readme = (ROOT / "README.md").read_text()
    snippets = [s for s in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OWNER" not in s]
    assert len(snippets) >= 4
    from safetensors.torch import save_file

    monkeypatch.chdir(ROOT)
    for snippet in snippets:
        if "features.safetensors" in snippet:
            from rotation_ssl import cli

            file = tmp_path / "features.safetensors"
            assert cli.main(["features", "rotation_ssl/samples/photos", "-o", str(file)]) == 0
            snippet = snippet.replace("features.safetensors", str(file))
        if "mine.safetensors" in snippet:
            import timm

            save_file(timm.create_model("rotnet_nin").state_dict(), tmp_path / "mine.safetensors")
            snippet = snippet.replace("mine.safetensors", str(tmp_path / "mine.safetensors"))
        exec(compile(snippet, "README.md", "exec"), {})
