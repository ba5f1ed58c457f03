"""What is in a file or folder of a user's, as a hash: the same path may hold other rows tomorrow.

Bytes are read again only where a file's size or one of its times has changed since they were last
read, so that a second `make reproduce` of gigabytes takes no second reading.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from neft_utils.base import files
from neft_utils.base.files import atomic_write_text, sha256_file

# A file system's clock may tick this seldom: a file that was written so shortly ago may change
# again without a change of its times.
TICK = 2.0  # seconds


def content_of(path):
    """sha256 in hex of a file, or of all files of a folder with their names; None if not there.

    Hidden files and folders do not count. Raises OSError for what may not be read.
    """
    path, known, found = Path(path), _Known(), []
    if path.is_file():
        whole = known.sha256(path)
        known.keep()
        return whole
    if not path.is_dir():
        return None
    for place, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(place) / name
            if not name.startswith(".") and file.is_file():
                found.append((file.relative_to(path).as_posix(), known.sha256(file)))
    known.keep()
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class _Known:
    """Hashes of files by their sizes and times, kept in a file that may be lost at any time."""

    def __init__(self):
        self.file, self.new = files.ROOT / ".snakemake" / "contents.json", {}
        try:
            self.old = dict(json.loads(self.file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self.old = {}

    def sha256(self, path):
        where, about = str(path.resolve()), self._about(path)
        known = self.old.get(where)
        if known and known[:-1] == about:
            return known[-1]
        found = sha256_file(path)
        changed = max(about[1], about[2]) / 1e9
        if self._about(path) == about and time.time() - changed > TICK:
            self.new[where] = [*about, found]
        return found

    def keep(self):
        if self.new and os.access(self.file.parent, os.W_OK):
            atomic_write_text(self.file, json.dumps({**self.old, **self.new}))

    @staticmethod
    def _about(path):
        # The time of the last change of the entry itself (ctime) cannot be set back, others can.
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
