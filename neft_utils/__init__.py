"""NEFTune, measured: noisy embeddings for instruction fine-tuning, and tools to check them.

The names below are meant for reuse; each is imported when it is first asked for, so that
`import neft_utils` costs nothing.
"""

import importlib
import logging
import warnings

_HOME = {
    "noise_scale": "noise",
    "noisy_embeddings": "noise",
    "NEFTuneCallback": "noise",
    "EmbeddingNoise": "noise",
    "suggest_noise_alpha": "noise",
    "load_profile": "base.read_profile",
    "load_base": "train.base_models",
    "load_tokenizer": "train.base_models",
    "response_nll": "train.losses",
    "answer": "evaluate.generate",
    "confirmatory_interval": "compare.stats",
    "verdict": "compare.stats",
}
__all__ = list(_HOME)

# Two messages that no reader can use: progress bars are off, and so is a kernel hub.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
