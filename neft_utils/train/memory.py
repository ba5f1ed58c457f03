"""What to change when memory runs out."""

import contextlib

import torch


@contextlib.contextmanager
def out_of_memory(setting, value):
    """Turn running out of memory into one line that names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"out of memory: lower {setting} (now {value}) in the profile, or --cores, and run"
            " the same command again: finished steps are kept"
        ) from None
