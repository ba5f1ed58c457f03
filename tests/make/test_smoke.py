"""The smoke chain: the real model and real rows at tiny sizes, then notebooks by hand."""

import json

import nbformat
import pytest
from chains import copy_of_the_repository, neft, surroundings
from nbclient import NotebookClient

from neft_utils.base.files import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("03", "05")  # the others take a minute each, and the chain runs the same cells


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = copy_of_the_repository(tmp_path_factory.mktemp("smoke"))
    done = neft(folder, "reproduce", "--profile", "smoke", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.wheels
def test_the_smoke_chain_trains_and_measures(smoke):
    results = smoke / "results/local/smoke"
    claims = json.loads((results / "claims.json").read_text("utf-8"))
    by_id = {row["id"]: row for row in claims}
    assert by_id["content_nll"]["primary"] and by_id["content_nll"]["estimate"] is not None
    assert by_id["content_nll"]["outcome"] == "not_testable"  # one seed
    noise = json.loads((results / "runs/neft_a15-s0/noise.json").read_text("utf-8"))
    assert noise["effective_alpha_p50"] == 15 and 0.1 < noise["relative_rms"] < 1


@pytest.mark.wheels
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n[:2] in QUICK else pytest.mark.slow) for n in NOTEBOOKS],
)
def test_a_notebook_runs_by_hand_with_its_defaults(smoke, name, monkeypatch):
    """In Jupyter's way: from its own folder."""
    for variable, value in surroundings(smoke).items():
        monkeypatch.setenv(variable, value)
    NotebookClient(
        nbformat.read(smoke / "notebooks" / name, as_version=4),
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(smoke / "notebooks")}},
    ).execute()
