"""The smoke chain: the real model and real rows at tiny sizes, then every notebook by hand."""

import json

import nbformat
import pytest
from chains import copy_of_the_repository, neft, surroundings
from nbclient import NotebookClient


@pytest.mark.wheels
def test_smoke_chain_then_every_notebook_by_hand(tmp_path, monkeypatch):
    """Real model and data, then each notebook in Jupyter's way: own folder, defaults."""
    folder = copy_of_the_repository(tmp_path)
    done = neft(folder, "reproduce", "--profile", "smoke", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    claims = json.loads((folder / "results/local/smoke/claims.json").read_text("utf-8"))
    assert claims[0]["id"] == "confirmatory" and claims[0]["estimate"] is not None
    assert claims[0]["outcome"] == "not_testable"  # one seed
    noise = json.loads(
        (folder / "results/local/smoke/runs/neft_a15-s0/noise.json").read_text("utf-8")
    )
    assert noise["effective_alpha_p50"] == 15 and 0.1 < noise["relative_rms"] < 1
    for name, value in surroundings(folder).items():
        monkeypatch.setenv(name, value)
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
