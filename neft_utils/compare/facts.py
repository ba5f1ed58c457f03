"""What others have printed: the paper's tables, the leaderboard's rows and how its models answered.

`facts/paper_results.csv` holds every number that the tables of arXiv 2310.05914 print;
`facts/leaderboard_rows.csv` the public leaderboard's rows around the authors' submission
(they also ship in the PyPI package alpaca-eval), raw and length-controlled;
`facts/published_decoding.csv` how the two Alpaca models of the leaderboard were decoded.
"""

import pandas as pd

from neft_utils.evaluate.alpaca_eval import CONTROL, FACTS, TREATMENT


def paper_results():
    """The paper's tables as one DataFrame: table, model, tuning, train_data, noise,
    noise_alpha, metric, judge, value, note. Win rates in percent."""
    return pd.read_csv(FACTS / "paper_results.csv", dtype={"table": str, "noise_alpha": str})


def leaderboard_rows():
    """The leaderboard's rows: leaderboard, model, win_rate and length_controlled_win_rate in
    percent, avg_chars."""
    return pd.read_csv(FACTS / "leaderboard_rows.csv")


def decoding_rows():
    """How the two public Alpaca models answered: model, base_model, do_sample, temperature,
    top_p, repetition_penalty, max_length, source (paths in the alpaca_eval repository)."""
    return pd.read_csv(FACTS / "published_decoding.csv")


def leaderboard_pair(control=CONTROL, treatment=TREATMENT):
    """One pair of rows as {"raw", "length_controlled", "chars"}: (control, treatment, difference).

    Of AlpacaEval 1. Differences are treatment minus control: percentage points and characters.
    """
    rows = leaderboard_rows().query("leaderboard == 'AlpacaEval 1'").set_index("model")
    names = ("win_rate", "length_controlled_win_rate", "avg_chars")
    out = {}
    for name, column in zip(("raw", "length_controlled", "chars"), names, strict=True):
        low, high = rows.loc[control, column], rows.loc[treatment, column]
        out[name] = (float(low), float(high), round(float(high - low), 2))
    return out


def paper_values():
    """What the claims quote from the paper's tables, as text, by name."""
    table = paper_results().set_index("table")

    def values(where, **only):
        rows = table.loc[where]
        for column, value in only.items():
            rows = rows[rows[column] == value]
        return [float(one) for one in rows.value]

    wins, alpaca = {"metric": "win_rate_vs_davinci003"}, {"train_data": "Alpaca"}
    bare, *qlora = values("3", model="LLaMA-2-7B", **wins, **alpaca)
    plain, noisy = (
        values("2", noise=noise, **wins) for noise in ("none", "uniform")
    )  # 7B, Chat-7B, 13B, 70B
    gains = [b - a for a, b in zip(plain, noisy, strict=True)]
    long = values("5", note="prompt: long and comprehensive", **wins)
    chars = values("4", metric="response_chars", train_data="ShareGPT")
    judged = values("1/7", train_data="ShareGPT", **wins)
    small = [one - bare for one in qlora]
    return {
        **{
            f"1/7 {data} win": _arrow(values("1/7", train_data=data, **wins))
            for data in ("Alpaca", "ShareGPT")
        },
        "4 ShareGPT ratio": f"{chars[1] / chars[0]:.2f}",
        "1/7 ShareGPT gain": f"{judged[1] - judged[0]:+.1f}",
        "2 Chat gain": f"{gains[1]:+.1f}",
        "3 gains": f"{min(small):+.1f} to {max(small):+.1f}",
        "3 Alpaca alphas": ", ".join(f"{one:g}" for one in qlora),
        "2 gains": f"{min(gains):.1f} to {max(gains):.1f}",
        "4 Alpaca chars": _arrow(values("4", metric="response_chars", **alpaca)),
        "5 NEFTune": f"{values('5', note='NEFTune', **wins)[0]:g}",
        "5 long": f"{long[0]:g}",
    }


def _arrow(pair):
    return f"{pair[0]:g} to {pair[1]:g}"
