"""Which engine answers: vLLM where a profile asks for it and some Python here has it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from neft_utils.base.strict import ConfigError

VARIABLE = "NEFT_VLLM_PYTHON"
WORKER = Path(__file__).with_name("worker.py")  # what runs there


def vllm_python(profile):
    """Path of the Python that has vLLM: NEFT_VLLM_PYTHON's, else this one; None without.

    None too where the profile does not ask for it. Raises ConfigError for a variable that names
    none.
    """
    if profile.evaluate.answer_engine != "vllm":
        return None
    named = os.environ.get(VARIABLE)
    if not named:
        return sys.executable if importlib.util.find_spec("vllm") else None
    test = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([named, "-c", test], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        raise ConfigError(
            f"{VARIABLE}: {named} is no Python that has vLLM: name one, or unset it to answer with"
            " transformers"
        )
    return named
