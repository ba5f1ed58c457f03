"""What a model's config.json says of its lengths; a dict of plain values is enough."""

import re

from neft_utils.base.strict import ConfigError

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
# Lengths at which a model begins to compute differently.
_EDGE = re.compile("window|chunk|block_size|local|original_max_position")


def position_limit(values):
    """The number of tokens that the model reads, or None where its config names none."""
    inner = values.get("text_config")
    values = {**values, **(inner if isinstance(inner, dict) else {})}
    found = (values.get(name) for name in _LIMITS)
    return next((one for one in found if type(one) is int and one > 0), None)


def edges(values):
    """The positive integers, nested ones too, whose key speaks of a window or the like: a set."""
    found = set()
    for key, value in values.items():
        if isinstance(value, dict):
            found |= edges(value)
        elif _EDGE.search(str(key)):
            many = value if isinstance(value, list) else [value]
            found |= {one for one in many if type(one) is int and one > 0}
    return found


def check_lengths(profile, values):
    """Raise ConfigError for rows or answers of a profile that are longer than the model reads."""
    limit = position_limit(values)
    longest = profile.data.max_tokens + profile.evaluate.max_new_tokens
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_tokens {profile.data.max_tokens} and evaluate.max_new_tokens"
            f" {profile.evaluate.max_new_tokens} together exceed the {limit} tokens that"
            f" {profile.model.source} reads: lower one of them"
        )
