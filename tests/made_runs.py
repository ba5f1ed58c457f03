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
        "provenance": {"arm": "made", "seed": 0, "train_seconds": seconds},
        "generations": pd.DataFrame(),
        "noise": None,
        "log": pd.DataFrame({"validation_nll": [2.0, 1.9]}),
        "curve": None,
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


def curve(train, validation, tokens=10, end_nll=0.5):
    """losses_by_epoch.csv of a run, as `run["curve"]` has it.

    train, validation: {epoch: content NLL of each row, nats per token}; tokens, end_nll: of every
    row, or a list that begins with each row's.
    """
    rows, size = [], max(len(c) for levels in (train, validation) for c in levels.values())
    each, ends = (x if isinstance(x, list) else [x] * size for x in (tokens, end_nll))
    for split, levels in (("train", train), ("validation", validation)):
        for epoch, contents in levels.items():
            for row, content in enumerate(contents):
                n, end = each[row], ends[row]
                rows.append((epoch, split, row, n, (content * (n - 1) + end) / n, end))
    return pd.DataFrame(rows, columns=["epoch", "split", "row", "n_tokens", "nll", "end_nll"])
