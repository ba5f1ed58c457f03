"""Files and folders of rows become records: a list of {column: value}, whatever the format."""

import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path

FORMATS = ".json, .jsonl, .ndjson, .csv, .tsv (each also as .gz) and .parquet"
LINES = (".jsonl", ".ndjson")


class DataError(ValueError):
    """A failure the user can cause; its message is one line with the cause and the remedy."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


# ----------------------------------------------------------------------------- any of them


def read_file(path):
    """Records of one file, by its suffix in whatever case. Raises DataError."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet(path)
    if suffix not in (".json", *LINES, ".csv", ".tsv"):
        raise DataError(f"{path}: cannot tell its format; wanted: {FORMATS}, or a folder")
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        return _table(text, path, suffix)
    return _objects(text, path, suffix)


def read_folder(path, name):
    """Records of a folder that the library `datasets` knows: saved by it, or of plain files.

    name: what messages call it. Nothing is written. Raises DataError.
    """
    import datasets  # here, because it takes seconds and few sources need it

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                only = next(iter(saved)) if len(saved) == 1 else "train"
                if only not in saved:
                    raise DataError(
                        f"{name}: has splits {', '.join(saved)} and no train: save the one that"
                        " is meant by itself"
                    )
                saved = saved[only]
            return saved.to_list()
        # Streamed: the other way copies every row into a cache of the library's own.
        return list(datasets.load_dataset(str(path), split="train", streaming=True))
    except DataError:
        raise
    except Exception as error:  # a dozen kinds, from the disk down to the parser
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(
            f"{name} cannot be loaded ({reason}): get it again, or give one file ({FORMATS})"
        ) from None


# ---------------------------------------------------------------------------------- one each


def _objects(text, path, suffix):
    """Objects of a list, or one a line: what the file holds counts, not what it is called."""
    first = text.lstrip()[:1]
    if suffix in LINES and first != "[":
        return _of_lines(text, path)
    if first == "{":
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # more objects behind the first
                return _of_lines(text, path)
        except (ValueError, RecursionError):
            pass  # said below
    value = parse_json(text, path)
    if not isinstance(value, list):
        raise DataError(f"{path}: holds one {type(value).__name__}; wanted: a list of objects")
    return value


def _table(text, path, suffix):
    """Rows of a table with a header; every value is text, an empty one too."""
    header = text.lstrip().partition("\n")[0]
    # Spreadsheets of many countries write semicolons into a .csv.
    mark = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # Strict: a quote that is never closed would swallow the rows behind it.
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
    except csv.Error as error:
        kind = suffix[1:].upper()
        raise DataError(f"{path}: is no {kind} table ({error}): save it again") from None
    finally:
        csv.field_size_limit(limit)
    names, *rows = [row for row in rows if row] or [[]]
    plain = [name.strip().lower() for name in names]
    if twice := {name for name in plain if plain.count(name) > 1}:
        raise DataError(f"{path}: has column {min(twice)!r} twice: rename one of them")
    for n, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise DataError(
                f"{path}, row {n}: has {len(row)} values for {len(names)} columns: quote values"
                " that hold a separator or a line break"
            )
    return [dict(zip(names, row, strict=True)) for row in rows]


def _parquet(path):
    import pyarrow.parquet  # here, because few sources need it

    try:
        return pyarrow.parquet.read_table(io.BytesIO(_bytes(path))).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be loaded ({str(error)[:200]}): get it again") from None


# --------------------------------------------------------------------------------- text, JSON


def _bytes(path):
    """The bytes of a file, unpacked where its name ends in .gz."""
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if Path(path).name.lower().endswith(".gz") else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is no whole gzip file ({error}): get it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def read_text(path):
    """Text of a UTF-8 file, which may be packed with gzip. Raises DataError."""
    try:
        text = _bytes(path).decode("utf-8-sig")  # Windows editors put a mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(path):
    """Values of a JSON Lines file, blank lines skipped. Raises DataError."""
    return _of_lines(read_text(path), path)


def _of_lines(text, path):
    lines = text.split("\n")
    return [parse_json(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]


def parse_json(text, path, line=None):
    """The value of a JSON text, which is the given line of the file, or all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON at line {line or error.lineno}, column {error.colno} ({error.msg});"
            " wanted: one list of objects, or one object a line"
        ) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{path}: line {line or 1} cannot be read ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply; wanted: flat objects") from None
