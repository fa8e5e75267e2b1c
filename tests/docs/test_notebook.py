"""The notebook of the documentation runs from start to end, and shows what its text says."""

import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def read_cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_no_outputs_are_kept():
    cells = read_cells()
    assert cells and not any(cell.outputs or cell.execution_count or cell.metadata for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=os.environ)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    text = "\n".join(data["text/plain"] for data in shown)
    correct, rotated = map(int, re.search(r"(\d+) of (\d+) rotated images", text).groups())
    assert correct > 0.85 * rotated == 0.85 * 160
    confidence, threshold = map(float, re.search(r"confidence (0\.\d+), threshold (0\.\d+)", text).groups())
    assert confidence > threshold and "rotated by 90 degrees" in text
    assert re.search(r"\d+ of 10 test images", text)
    assert sum("image/png" in data for data in shown) == 3
    assert not list(tmp_path.iterdir())
