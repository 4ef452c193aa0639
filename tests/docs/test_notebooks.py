"""Every notebook in examples/ runs from its top to its end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from snippets import ROOT, check_python

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MINUTES_A_CELL = 10


def run_notebook(path: Path, folder: Path) -> None:
    """Execute a notebook in a folder. Raises what its first failing cell raises."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=60 * MINUTES_A_CELL, kernel_name="python3", resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_code_of_a_notebook_can_be_right(path):
    pytest.importorskip("IPython")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        check_python("".join(cell["source"]), may_be_absent=False)
        assert not cell["outputs"], "stored with what it printed, which nobody checks: clear all outputs"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}{os.pathsep}{ROOT}")
    run_notebook(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "fails"), [("assert 1 == 1", False), ("assert 1 == 2", True)])
def test_a_cell_that_fails_is_found(tmp_path, code, fails):
    path = tmp_path / "notebook.ipynb"
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": code}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    if fails:
        with pytest.raises(Exception, match="AssertionError"):
            run_notebook(path, tmp_path)
    else:
        run_notebook(path, tmp_path)
