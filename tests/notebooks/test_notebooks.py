"""Notebooks run from top to bottom, here as in Colab, and are kept without what they showed."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def shown(notebook):
    """(MIME type, content) of everything that its cells put out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            yield from output.get("data", {}).items()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not list(shown(notebook))
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    assert "/" not in json.dumps(notebook.metadata)  # no path of the machine it was written on


def test_videos_from_text_and_pictures_are_shown_inline(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # most of its time is drawing, not compiling
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    pages = [content for kind, content in shown(notebook) if kind == "text/html"]
    pictures = [content for kind, content in shown(notebook) if kind == "image/png"]
    assert sum("<video" in page for page in pages) == 3
    assert len(pictures) == 7
    assert {path.name for path in tmp_path.iterdir()} >= {"wide.mp4", "wide.json", "wide.txt", "first.png", "last.png"}
