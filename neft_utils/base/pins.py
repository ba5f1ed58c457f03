"""The versions that the reproduction is pinned to."""

import re

from neft_utils.base.files import CODE

PYTHON = "3.11"  # what the pins are for
PINS = CODE / "requirements.txt"


def pins():
    """{package: version} of requirements.txt."""
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", PINS.read_text("utf-8"), re.M))
