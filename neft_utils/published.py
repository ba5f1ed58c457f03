"""Other people's runs: the paper's tables and the public AlpacaEval leaderboard rows.

`facts/paper_results.csv` holds every number that the tables of arXiv 2310.05914 print;
`facts/leaderboard_rows.csv` the public leaderboard's rows around the authors' submission
(they also ship in the PyPI package alpaca-eval), raw and length-controlled.
"""

from pathlib import Path

import pandas as pd

FACTS = Path(__file__).resolve().parent / "facts"


def paper_results():
    """The paper's tables as one DataFrame: table, model, tuning, train_data, noise,
    noise_alpha, metric, judge, value, note. Win rates in percent."""
    return pd.read_csv(FACTS / "paper_results.csv", dtype={"table": str, "noise_alpha": str})


def leaderboard_rows():
    """The leaderboard's rows: leaderboard, model, win_rate and length_controlled_win_rate in
    percent, avg_chars."""
    return pd.read_csv(FACTS / "leaderboard_rows.csv")


def leaderboard_pair(control="alpaca-7b", treatment="alpaca-7b-neft", board="AlpacaEval 1"):
    """One pair of rows as {"raw", "length_controlled", "chars"}: (control, treatment, difference).

    Differences are treatment minus control: percentage points and characters.
    """
    rows = leaderboard_rows().query("leaderboard == @board").set_index("model")
    names = {
        "raw": "win_rate",
        "length_controlled": "length_controlled_win_rate",
        "chars": "avg_chars",
    }
    out = {}
    for name, column in names.items():
        low, high = rows.loc[control, column], rows.loc[treatment, column]
        out[name] = (float(low), float(high), round(float(high - low), 2))
    return out
