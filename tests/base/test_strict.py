"""What a library raises, as one line with a remedy."""

import pytest

from neft_utils.base.strict import ConfigError, one_line


def test_what_a_library_raises_is_one_line_with_its_kind_and_words():
    with pytest.raises(ConfigError) as caught, one_line("it fails ({reason}): mend it"):
        raise KeyError("a\n{reason}  b" + "x" * 500)
    said = str(caught.value)
    assert said.startswith("it fails (KeyError: ") and said.endswith("): mend it")
    assert "\n" not in said and len(said) < 250


class OutOfMemoryError(RuntimeError):
    """Named as torch's own, which this module does not import."""


@pytest.mark.parametrize("kind", [MemoryError, OutOfMemoryError, KeyboardInterrupt])
def test_too_little_memory_and_an_interruption_stay_what_they_are(kind):
    with pytest.raises(kind), one_line("it fails ({reason}): mend it"):
        raise kind
