"""The notebook runs in a real kernel, and shows states, histories and rehearsals as it should."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "examples"


def executed(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each cell shows last, by the cell's name; a cell that raises is an error."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name))
    NotebookClient(notebook, timeout=600, startup_timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell.outputs[-1] for cell in notebook.cells if cell.cell_type == "code" and cell.outputs}


def test_it_is_kept_without_outputs():
    notebook: Any = nbformat.read(FOLDER / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 6 and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_what_its_cells_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notebook: Any = nbformat.read(FOLDER / "notebook.ipynb", as_version=4)
    outputs = executed(notebook, tmp_path, monkeypatch)
    for cell, name in (("rehearsal", "fast_dev_run"), ("overfitting", "overfit_batches")):
        assert outputs[cell].data["text/plain"].startswith(f"{name}: no findings\n  ran: ")
    digest = outputs["run"].text.strip()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    state = outputs["state"].data
    assert f"<th>digest</th><td>{digest}</td>" in state["text/html"]
    assert "<td>Progress(epochs=10, steps=130, steps_in_epoch=0)</td>" in state["text/html"]
    assert re.search(r"<th>eval loss</th><td>0\.\d+</td>", state["text/html"])
    assert f"digest={digest[:12]})\n  params: 4 tensors, 260 bytes: " in state["text/plain"]
    history = outputs["history"].data
    assert history["text/plain"].startswith("History(46 rows, steps 5 to 130, eval loss 0.")
    assert history["text/html"].count("<tr>") == 11 and "<td>130</td><td>10</td><td>eval</td>" in history["text/html"]
