"""The claims ledger: every claim made for NEFTune beside our number, its interval and a verdict.

The confirmatory claim stands alone; the others are secondary and only called detected if
they stay so after Holm's correction among themselves. A claim that a profile cannot answer
says so and names the profile that can.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import pandas as pd
import yaml

from neft_utils.base.files import atomic_write_text, write_csv, write_json
from neft_utils.base.paths import BASE, NOTEBOOKS, STEPS
from neft_utils.base.profiles import decoding_name
from neft_utils.base.strict import ConfigError
from neft_utils.compare import stats
from neft_utils.compare.metrics import METRICS
from neft_utils.compare.published import FACTS, paper_results
from neft_utils.compare.runs import caveats
from neft_utils.compare.tables import (
    by_seed,
    contrast,
    contrasts,
    digits_of,
    length_views,
    main_markdown,
    main_table,
    paired,
    show,
)

FIRST = "confirmatory"
PLAN_COLUMNS = ["n_seeds", "detectable"]
MANY_ROWS = 1000  # training rows from which a profile speaks of much data


@dataclass(frozen=True)
class Claim:
    metric: str
    claimed: int  # sign of the effect that the claim predicts; 0: an effect of either sign
    text: str
    paper: str  # what it reports; {…} is filled from its tables
    note: str  # why ours may differ
    elsewhere: str = "cpu-long"  # the profile that can answer
    pair: str = "confirmatory"  # which arms, see `arms_of`
    margin: bool = False  # a claim of "no worse": the whole interval within the profile's margin


CLAIMS = {
    name: Claim(**fields)
    for name, fields in yaml.safe_load((FACTS / "claims.yaml").read_text("utf-8")).items()
}


def arms_of(pair, profile):
    """(treatment, [controls]) of a kind of contrast, or None where the profile has no such arms."""
    treatment, control = _confirmatory(profile)
    noisy = {n: a for n, a in profile.arms.items() if a.noise_alpha > 0}
    plain = [n for n, a in profile.arms.items() if a.noise_alpha == 0 and n != control]
    whole = [n for n, a in noisy.items() if a.data_fraction == 1 and only_alpha(a)]
    if pair in ("confirmatory", "equal_length"):
        return treatment, [control]
    if pair == "low_data":
        small = [n for n, a in noisy.items() if a.data_fraction < 1]
        arm = min(small, key=lambda n: profile.arms[n].data_fraction, default=None)
        return arm and (arm, [profile.control_of(arm)])
    if pair == "much_data":
        return (treatment, [control]) if profile.data.train_rows >= MANY_ROWS else None
    if pair == "alpha":
        weaker = [n for n in whole if noisy[n].noise_alpha < profile.arms[treatment].noise_alpha]
        arm = min(weaker, key=lambda n: noisy[n].noise_alpha, default=None)
        return arm and (treatment, [arm])
    if pair == "too_strong":
        usual = profile.arms[treatment].noise_alpha
        strong = [n for n in whole if noisy[n].noise_alpha >= 3 * usual > 0]
        return (strong[0], [control]) if strong else None
    if pair == "regularisers":
        others = [n for n in plain if profile.arms[n].lora_dropout or profile.arms[n].weight_decay]
        return (treatment, others) if others else None
    return None


def _confirmatory(profile):
    return profile.confirmatory.treatment, profile.confirmatory.control


def only_alpha(arm):
    """Whether an arm's noise is the paper's, and its recipe the profile's."""
    changed = (arm.learning_rate, arm.epochs, arm.batch_size, arm.lora_rank, arm.lora_dropout)
    usual = (arm.distribution, arm.length, arm.where) == ("uniform", "sequence", "all")
    return usual and arm.weight_decay is None and all(one is None for one in changed)


def dose(runs, seeds, profile):
    """Every run with the paper's noise, under whatever length rule, beside its control.

    DataFrame arm, seed, noise_alpha, length (the rule), effective_alpha (median over sequences),
    relative_rms (noise over embedding) and train_nll, test_nll: differences to the control of the
    seed. seeds: `results.by_seed`.
    """
    losses, rows = seeds.set_index(["arm", "seed"])[["train_nll", "test_nll"]], []
    for (arm, seed), run in runs.items():
        change = profile.arms.get(arm)
        if change is None or not change.noise_alpha or change.data_fraction < 1:
            continue
        control = (profile.control_of(arm), seed)
        if control not in runs or not only_alpha(dataclasses.replace(change, length="sequence")):
            continue
        noise = run["noise"]
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "noise_alpha": change.noise_alpha,
                "length": change.length,
                "effective_alpha": noise["effective_alpha_p50"],
                "relative_rms": noise["relative_rms"],
                **(losses.loc[(arm, seed)] - losses.loc[control]).to_dict(),
            }
        )
    columns = ["arm", "seed", "noise_alpha", "length", "effective_alpha", "relative_rms"]
    return pd.DataFrame(rows, columns=[*columns, "train_nll", "test_nll"])


def ledger(runs, seeds, profile, decoding):
    """A list of dicts, one row per claim, in the order of CLAIMS."""
    found, arms = {}, {}
    for name, claim in CLAIMS.items():
        pair = arms[name] = arms_of(claim.pair, profile)
        if claim.pair == "equal_length":
            # The form was fixed beforehand: AlpacaEval's. The other views are in length_views.csv.
            views = length_views(runs, *_confirmatory(profile))
            values = views[views["view"] == "tanh"].estimate.dropna()
            if len(values):
                found[name] = stats.seed_interval(values.to_numpy())
        elif claim.pair == "lines":
            count = float(lines_to_add())
            found[name] = stats.Interval(count, count, count, 0.0, math.inf, 1, 1, 0.0)
        elif pair is not None:
            found[name] = contrast(runs, seeds, *pair, claim.metric, decoding)
    testable = {n for n, one in found.items() if one is not None and math.isfinite(one.ci_low)}
    # A profile of many rows answers much_data by the confirmatory contrast itself.
    same = {n for n in arms if (arms[n], CLAIMS[n].metric) == (arms[FIRST], CLAIMS[FIRST].metric)}
    secondary = [n for n in CLAIMS if n in testable - same - {"few_lines"}]
    adjusted = dict(
        zip(secondary, stats.holm([stats.p_value(found[n]) for n in secondary]), strict=True)
        if secondary
        else ()
    )
    facts, rows = paper_values(), []
    for name, claim in CLAIMS.items():
        unit, interval = METRICS.get(claim.metric, ("lines", ""))[0], found.get(name)
        words = stats.verdict(
            interval,
            unit=unit,
            claimed=claim.claimed,
            adjusted_p=adjusted.get(name),
            elsewhere=None if claim.elsewhere == profile.name else claim.elsewhere,
            margin=profile.margins.get(claim.metric) if claim.margin else None,
        )
        treatment, controls = arms[name] or (profile.confirmatory.treatment, [])
        numbers = ("estimate", "ci_low", "ci_high", "detectable")
        rows.append(
            {
                "id": name,
                "claim": claim.text,
                "contrast": f"{treatment} - {' & '.join(controls)}" if controls else None,
                "metric": claim.metric,
                "unit": unit,
                **{n: _plain(getattr(interval, n, math.nan)) for n in numbers},
                "verdict": words,
                "paper": claim.paper.format(**facts),
                "note": claim.note,
            }
        )
    return rows


def lines_to_add():
    """Lines of notebook 7 that a user's own training code needs for the noise, counted."""
    source = json.loads((NOTEBOOKS / f"{STEPS[7]}.ipynb").read_text("utf-8"))
    code = [line for c in source["cells"] if c["cell_type"] == "code" for line in c["source"]]
    return len({line.strip() for line in code if "NEFTuneCallback" in line or "callbacks=" in line})


def paper_values():
    """What the claims quote from the paper's tables, as text, by name."""
    table = paper_results().set_index("table")

    def values(where, **only):
        rows = table.loc[where]
        for column, value in only.items():
            rows = rows[rows[column] == value]
        return [float(one) for one in rows.value]

    wins, alpaca = {"metric": "win_rate_vs_davinci003"}, {"train_data": "Alpaca"}
    qlora = values("3", model="LLaMA-2-7B", noise="uniform", **wins, **alpaca)
    plain, noisy = (
        values("2", noise=noise, **wins) for noise in ("none", "uniform")
    )  # 7B, Chat-7B, 13B, 70B
    gains = [b - a for a, b in zip(plain, noisy, strict=True)]
    long = values("5", note="prompt: long and comprehensive", **wins)
    return {
        **{
            f"1/7 {data} win": _arrow(values("1/7", train_data=data, **wins))
            for data in ("Alpaca", "ShareGPT")
        },
        "3 Alpaca alphas": ", ".join(f"{one:g}" for one in qlora),
        "2 gains": f"{min(gains):.1f} to {max(gains):.1f}",
        "4 Alpaca chars": _arrow(values("4", metric="response_chars", **alpaca)),
        "5 NEFTune": f"{values('5', note='NEFTune', **wins)[0]:g}",
        "5 long": f"{long[0]:g}",
    }


def _arrow(pair):
    return f"{pair[0]:g} to {pair[1]:g}"


def _plain(value):
    return float(value) if math.isfinite(value) else None


# -------------------------------------------------------------------------------- writing


def claims_markdown(rows):
    """The ledger for people: estimate [interval], verdict, the paper's value."""
    lines = ["| claim | treatment - control [95 % CI] | verdict | paper |", "|---|---|---|---|"]
    for row in rows:
        digits, number = digits_of(row["unit"]), "–"
        if row["estimate"] is not None:
            number = f"{row['metric']} {show(row['estimate'], digits)} {row['unit']}"
        if row["ci_low"] is not None and row["ci_low"] != row["ci_high"]:
            number += f" [{show(row['ci_low'], digits)}, {show(row['ci_high'], digits)}]"
        lines.append(f"| {row['claim']} | {number} | {row['verdict']} | {row['paper']} |")
    return "\n".join(lines) + "\n"


def write_tables(profile, runs, paths):
    """Compute and write tables/*.csv|md and claims.json; returns them as a dict."""
    if unknown := sorted(set(profile.margins) - set(METRICS)):
        raise ConfigError(
            f"profile {profile.name}: margins.{unknown[0]} is no metric: use {', '.join(METRICS)}"
        )
    decoding = decoding_name(profile.evaluate.repetition_penalty)
    seeds = by_seed(runs, decoding)
    arms = [arm for arm in (BASE, *profile.arms) if arm in set(seeds.arm)]
    main = main_table(seeds, arms)
    table = contrasts(runs, seeds, profile, decoding)
    rows = ledger(runs, seeds, profile, decoding)
    views = length_views(runs, *_confirmatory(profile))
    pair = profile.confirmatory
    deltas = paired(runs, pair.treatment, [pair.control], pair.metric, decoding)
    several = deltas is not None and deltas.seed.nunique() > 1
    plan = stats.planned_effects(deltas) if several else pd.DataFrame(columns=PLAN_COLUMNS)
    frames = {"by_seed": seeds, "main": main, "contrasts": table, "length_views": views}
    frames["plan"] = plan
    for name, frame in frames.items():
        write_csv(paths.tables / f"{name}.csv", frame)
    notes = "".join(f"\n{one}\n" for one in caveats(profile, runs))
    atomic_write_text(paths.tables / "main.md", main_markdown(main) + notes)
    atomic_write_text(paths.tables / "claims.md", claims_markdown(rows) + notes)
    write_json(paths.results / "claims.json", rows)
    return {**frames, "claims": rows}
