"""The notebook of the examples, run from its first cell to its last in an empty folder."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "caco_scale" / "examples"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def printed(notebook):
    """What the cells say, and the kinds of pictures that they show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    values = [output["data"] for output in outputs if "data" in output]
    return text + "\n".join(value.get("text/plain", "") for value in values), [*map(set, values)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs_and_is_listed(name):
    notebook = nbformat.read(FOLDER / name, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert name in (FOLDER / "README.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it keeps its run
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOLDER / name, 4)
    folder = tmp_path / "here"
    folder.mkdir()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    text, kinds = printed(notebook)
    assert sum("image/png" in kind for kind in kinds) == 3  # images, curves, neighbours
    assert "finished, step" in text
    of_features, of_pixels = (
        float(re.search(rf"on the {what}: +([\d.]+)%", text)[1]) for what in ("features", "raw pixels")
    )
    assert of_features > of_pixels
    assert list(folder.iterdir()) == [], "it leaves nothing where it is started"
