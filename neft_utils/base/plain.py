"""Text of people and models as a terminal may show it: it moves no cursor and hides nothing."""

import re

# Escape sequences of terminals: colours and cursor (CSI), titles and links (OSC), two letters.
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# All other control characters but line break and tab, and the marks that turn text about.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text):
    """A text without escape sequences and control characters; line breaks and tabs stay."""
    return _CONTROL.sub("", ESCAPES.sub("", str(text)))


def say(text=""):
    """Print a text that others may have written."""
    print(plain(text), flush=True)
