"""Files that are whole or not there: atomic writes, hashes, JSON; and the root of them all."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from neft_utils.base.strict import ConfigError

# The repository, or wherever NEFT_HOME says that data/ and results/ shall live.
CODE = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("NEFT_HOME") or CODE)


def check_code(place=None):
    """Raise ConfigError in a clone (place: a folder in it, else the working directory) whose
    package this is not: a copied .venv brings the code of the clone that it was made in."""
    place = Path(place or Path.cwd()).resolve()
    for folder in (place, *place.parents):
        if (folder / "Snakefile").is_file() and (folder / "neft_utils" / "base").is_dir():
            if folder != CODE:
                raise ConfigError(
                    f"this is {folder}, but Python imports neft_utils from {CODE}: use make, or in"
                    f" {folder} delete .venv and run make env"
                )
            return


def atomic_write_text(path, text):
    """Write a whole UTF-8 file or nothing: temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write indented JSON atomically; NaN and infinity are refused, they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path, rows):
    """Write one JSON object a line, atomically."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    atomic_write_text(path, "".join(line + "\n" for line in lines))


def write_csv(path, frame):
    """Write a pandas frame as CSV, atomically; floats in the shortest form that reads back."""
    atomic_write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def sha256_file(path):
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """JSON of a file, None where there is none; ValueError of one line for what is no JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not JSON ({error}): delete it and make it again"
        ) from None
