"""How well a model predicts given answers, example by example."""

import numpy as np
import pandas as pd

from neft_utils.train.encoding import encode
from neft_utils.train.losses import response_losses


def score_losses(model, tokenizer, splits, batch_tokens, say=print):
    """DataFrame split, example_id, n_tokens, nll, end_nll: one row an example.

    splits: {name: rows}; batch_tokens: tokens per forward. n_tokens counts the response's tokens,
    its end-of-turn token included; nll is their mean NLL in nats per token, end_nll the NLL of
    that last token alone. Noise and dropout are off.
    """
    frames = []
    for split, rows in splits.items():
        encoded = [encode(tokenizer, row) for row in rows]
        nll, end_nll = response_losses(model, encoded, batch_tokens)
        frame = {
            "split": split,
            "example_id": [row["id"] for row in rows],
            "n_tokens": [sum(e["completion_mask"]) for e in encoded],
            "nll": nll,
            "end_nll": end_nll,
        }
        frames.append(pd.DataFrame(frame))
        if rows:
            mean = np.average(frames[-1].nll, weights=frames[-1].n_tokens)
            say(f"{split}: {mean:.4f} nats a response token over {len(rows)} examples")
    return pd.concat(frames, ignore_index=True)
