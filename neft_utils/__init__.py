"""NEFTune, measured: noisy embeddings for instruction fine-tuning, and tools to check them.

The names below are meant for reuse; each is imported when it is first asked for, so that
`import neft_utils` costs nothing and changes nothing.
"""

import importlib

_HOME = {
    "noise_scale": "noise",
    "noisy_embeddings": "noise",
    "NEFTuneCallback": "noise",
    "EmbeddingNoise": "noise",
    "suggest_noise_alpha": "noise",
    "confirmatory_interval": "compare.stats",
    "seed_interval": "compare.stats",
    "planned_effects": "compare.planning",
    "verdict": "compare.words",
    "Quantity": "compare.words",
}
_LAB = {
    "load_profile": "base.read_profile",
    "load_base": "train.base_models",
    "load_tokenizer": "train.base_models",
    "response_nll": "train.losses",
    "answer": "evaluate.generate",
    "compare_models": "compare.two_models",
}
_HOME |= _LAB
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ImportError as error:
        if name not in _LAB:
            raise
        raise ImportError(
            f"{__name__}.{name} needs the lab extra: pip install 'neft_utils[lab]' ({error})"
        ) from None


def __dir__():
    return sorted([*globals(), *_HOME])
