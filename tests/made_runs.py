"""Runs as `compare.runs.load_runs` gives them, made of a few numbers."""

import pandas as pd

from neft_utils.evaluate.scoring import ITEM_COLUMNS

DECODING = "greedy_penalty_1.2"
NOTHING = {name.removesuffix(".csv"): columns for name, columns in ITEM_COLUMNS.items()}


def made_run(nll, seconds=10.0, tokens=10, end_nll=0.5, **tables):
    """A run as `runs.load_runs` gives it; nll: {example: value} of test rows."""
    losses = pd.DataFrame(
        [("test", name, tokens, value) for name, value in nll.items()],
        columns=["split", "example_id", "n_tokens", "nll"],
    ).assign(end_nll=end_nll)
    empty = {name: pd.DataFrame(columns=columns) for name, columns in NOTHING.items()}
    about = {"phase_seconds": {"losses": 1.0, "answers": 0.0}}
    return {
        "scores": {"provenance": about},
        "provenance": {"train_seconds": seconds},
        "generations": pd.DataFrame(),
        "noise": None,
        "log": pd.DataFrame({"validation_nll": [2.0, 1.9]}),
        **empty,
        "losses": losses,
        **tables,
    }


def losses_run(rows, **tables):
    """A run of losses (split, example_id, n_tokens, nll, end_nll)."""
    losses = pd.DataFrame(rows, columns=ITEM_COLUMNS["losses.csv"])
    return made_run({}, losses=losses, **tables)


def answers(lengths, decoding=DECODING):
    """generations.jsonl of test answers of these many tokens."""
    columns = ["set", "example_id", "decoding", "n_tokens", "stopped", "text"]
    rows = [("test", f"e{i}", decoding, n, True, "") for i, n in enumerate(lengths)]
    return pd.DataFrame(rows, columns=columns)
