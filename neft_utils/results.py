"""Many runs, one tidy table: per-item files in, contrasts, tables and the claims ledger out.

The unit is the seed pair: a treatment and a control run that share seed, training subset,
data order, dropout and LoRA initialisation. Every number here is computed from per-item
files (`losses.csv`, `generations.jsonl`) and provenance, never typed.
"""

import dataclasses
import json
import math

import pandas as pd

from neft_utils import provenance, stats
from neft_utils.config import BASE, ConfigError, Paths, decoding_name, load_profile
from neft_utils.data import read_jsonl

REFERENCE = "results/reference"
FIELDS = [field.name for field in dataclasses.fields(stats.Interval)]

# Metric -> (unit, what it is). The order is the order of the tables' columns.
METRICS = {
    "test_nll": ("nats/token", "response NLL on test rows, noise off"),
    "ood_nll": ("nats/token", "response NLL on MT-Bench reference answers"),
    "train_nll": ("nats/token", "response NLL on the run's own training rows, noise off"),
    "gap": ("nats/token", "test NLL minus train NLL"),
    "best_validation_nll": ("nats/token", "lowest validation NLL over epochs (exploratory)"),
    "answer_tokens": ("tokens", "length of greedy answers, repetition penalty 1.2"),
    "stop_rate": ("share", "answers that ended by themselves"),
    "two_gram_repetition": ("%", "repeated word pairs, paper's chunk rule"),
    "rouge_l": ("share", "ROUGE-L to the reference answers"),
    "train_seconds": ("s", "time of the optimiser steps"),
}


def open_results(profile, out):
    """(Profile, Paths to write to, runs): local results of the profile, else stored ones.

    Falls back to results/reference of the profile, then of "cpu", and says so; what is
    computed from them still goes to `out`. Raises ConfigError when there is nothing.
    """
    for name, folder in ((profile, out), (profile, REFERENCE), ("cpu", REFERENCE)):
        loaded = load_profile(name)
        stored = Paths(loaded.name, folder).results / "runs"
        wanted = (loaded.confirmatory.treatment, loaded.confirmatory.control)
        if all(list(stored.glob(f"{arm}-s*/scores.json")) for arm in wanted):
            if (name, folder) != (profile, out):
                print(f"no finished {profile} runs in {out}: reading {folder}/{loaded.name}")
            return loaded, Paths(loaded.name, out), load_runs(stored)
    raise ConfigError(f"no finished runs of {profile}: run make reproduce PROFILE={profile} first")


def load_runs(folder):
    """{(arm, seed): run} of the finished runs below `folder`.

    A run is a dict: scores and provenance, `losses` and `generations` as DataFrames, and
    `noise` and `log` (train_log.csv) for trained ones.
    """
    runs = {}
    for scores in sorted(folder.glob("*/scores.json")):
        run = scores.parent
        about = json.loads((run / "provenance.json").read_text("utf-8"))
        log = run / "train_log.csv"
        runs[about["arm"], about["seed"]] = {
            "scores": json.loads(scores.read_text("utf-8")),
            "provenance": about,
            "losses": pd.read_csv(run / "losses.csv", dtype={"example_id": str}),
            "generations": pd.DataFrame(read_jsonl(run / "generations.jsonl")),
            "noise": _json_or_none(run / "noise.json"),
            "log": pd.read_csv(log) if log.exists() else None,
        }
    return runs


def _json_or_none(path):
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def by_seed(runs, decoding):
    """One row per run: arm, seed and METRICS. decoding: the answers' decoding to report."""
    rows = []
    for (arm, seed), run in runs.items():
        scores = run["scores"]
        row = {"arm": arm, "seed": seed}
        for name in METRICS:
            row[name] = scores.get(name)
            if row[name] is None:
                source = {"answer_tokens": "n_tokens"}.get(name, name)
                row[name] = scores.get(f"{decoding}/{source}")
        if run["log"] is not None:
            row["best_validation_nll"] = run["log"].validation_nll.min()
            row["train_seconds"] = run["provenance"]["train_seconds"]
        rows.append(row)
    return pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))


def main_table(seeds, arms):
    """One row per arm: mean over seeds of each metric, its t interval, and n_seeds.

    The intervals say where another seed's run would move the mean, not whether arms differ:
    arms share their seeds, so compare them by `contrasts`.
    """
    rows = []
    for arm in arms:
        group = seeds[seeds.arm == arm]
        row = {"arm": arm}
        for name in METRICS:
            values = group[name].dropna().to_numpy()
            one = stats.seed_interval(values) if len(values) else None
            row[name] = one.estimate if one else math.nan
            row[f"{name}_ci_low"] = one.ci_low if one else math.nan
            row[f"{name}_ci_high"] = one.ci_high if one else math.nan
        rows.append({**row, "n_seeds": len(group)})
    return pd.DataFrame(rows)


def paired_losses(runs, treatment, control, split):
    """DataFrame seed, example_id, delta: NLL of treatment minus control on common rows."""
    frames = []
    for seed in _common_seeds(runs, treatment, control):
        losses = [runs[arm, seed]["losses"] for arm in (treatment, control)]
        sides = [one[one.split == split].set_index("example_id").nll for one in losses]
        if set(sides[0].index) != set(sides[1].index):
            raise ConfigError(f"runs {treatment}-s{seed} and {control}-s{seed} scored other rows")
        delta = sides[0] - sides[1]
        frames.append(pd.DataFrame({"seed": seed, "example_id": delta.index, "delta": delta.array}))
    return pd.concat(frames, ignore_index=True)


def paired_answers(runs, treatment, control, decoding, column="n_tokens"):
    """DataFrame seed, example_id, delta of an answer column, or None without answers."""
    frames = []
    for seed in _common_seeds(runs, treatment, control):
        sides = []
        for arm in (treatment, control):
            answers = runs[arm, seed]["generations"]
            if answers.empty:
                break
            sides.append(answers[answers.decoding == decoding].set_index("example_id")[column])
        if len(sides) == 2:
            delta = sides[0] - sides[1]
            frames.append(
                pd.DataFrame({"seed": seed, "example_id": delta.index, "delta": delta.array})
            )
    return pd.concat(frames, ignore_index=True) if frames else None


def _common_seeds(runs, treatment, control):
    seeds = sorted({s for a, s in runs if a == treatment} & {s for a, s in runs if a == control})
    if not seeds:
        raise ConfigError(f"no seed has finished runs of both {treatment} and {control}")
    return seeds


def contrasts(runs, seeds, profile, decoding):
    """Every arm against the control, every metric: tidy DataFrame with intervals.

    NLL on common rows and answer lengths use the two-way interval over seeds and examples;
    other metrics, and train rows (each seed has its own), the t interval over seed pairs.
    """
    control, rows = profile.confirmatory.control, []
    for arm in profile.arms:
        if arm == control:
            continue
        paired = {
            name: paired_losses(runs, arm, control, name[:-4]) for name in ("test_nll", "ood_nll")
        }
        paired["answer_tokens"] = paired_answers(runs, arm, control, decoding)
        for name, (unit, _) in METRICS.items():
            interval = _contrast(paired.get(name), seeds, arm, control, name)
            if interval is not None:
                rows.append(
                    {
                        "treatment": arm,
                        "control": control,
                        "metric": name,
                        "unit": unit,
                        **dataclasses.asdict(interval),
                        "p": stats.p_value(interval),
                        "verdict": stats.verdict(interval, unit=unit),
                    }
                )
    return pd.DataFrame(rows)


def _contrast(deltas, seeds, arm, control, name):
    if deltas is not None and len(deltas):
        return stats.confirmatory_interval(deltas)
    wide = seeds[seeds.arm.isin([arm, control])].pivot(index="seed", columns="arm", values=name)
    wide = wide.dropna()
    return stats.seed_interval((wide[arm] - wide[control]).to_numpy()) if len(wide) else None


# ----------------------------------------------------------------------- the claims ledger

# id -> (metric, sign of the effect that the claim predicts, claim, paper, why ours may differ)
CLAIMS = {
    "confirmatory": (
        "test_nll",
        -1,
        "Noise lowers the loss on held-out responses.",
        "The paper shows this loss as a figure only (Figure 5: slightly lower on Evol-Instruct).",
        "135M parameters and tens of thousands of training tokens instead of 7B and 20 million.",
    ),
    "less_overfitting": (
        "gap",
        -1,
        "Noise narrows the gap between test and training loss.",
        "Figure 5: training loss clearly higher, test loss slightly lower; no numbers.",
        "The gap also narrows when a run merely learns its training rows less well.",
    ),
    "longer_answers": (
        "answer_tokens",
        1,
        "Models trained with noise answer at greater length.",
        "Table 4, LLaMA-2-7B on Alpaca: 375 to 1062 characters.",
        "The base is already instruction-tuned and the training answers are short.",
    ),
    "training_cost": (
        "train_seconds",
        1,
        "Noise costs training time.",
        "The paper calls it free; no numbers.",
        "Timed while another run uses the other core, so single runs vary by a tenth or more.",
    ),
}


def claims(table, profile):
    """The ledger, a list of dicts: one row per id of CLAIMS, from the contrasts table.

    The confirmatory row stands alone; the others are secondary, and are only called
    detected if they stay so after Holm's correction among themselves.
    """
    treatment, control = profile.confirmatory.treatment, profile.confirmatory.control
    mine = table[table.treatment == treatment].set_index("metric")
    found = {
        name: stats.Interval(**mine.loc[metric, FIELDS].to_dict())
        for name, (metric, *_) in CLAIMS.items()
        if metric in mine.index
    }
    secondary = [n for n in found if n != "confirmatory" and math.isfinite(found[n].ci_low)]
    p_values = stats.holm([stats.p_value(found[n]) for n in secondary]) if secondary else []
    adjusted = dict(zip(secondary, p_values, strict=True))
    rows = []
    for name, (metric, claimed, claim, paper, note) in CLAIMS.items():
        unit, interval = METRICS[metric][0], found.get(name)
        verdict = stats.verdict(interval, unit=unit, claimed=claimed, adjusted_p=adjusted.get(name))
        numbers = ("estimate", "ci_low", "ci_high", "detectable")
        rows.append(
            {
                "id": name,
                "claim": claim,
                "contrast": f"{treatment} - {control}",
                "metric": metric,
                "unit": unit,
                **{n: _plain(getattr(interval, n, math.nan)) for n in numbers},
                "verdict": verdict,
                "paper": paper,
                "note": note,
            }
        )
    return rows


def _plain(value):
    return float(value) if math.isfinite(value) else None


# -------------------------------------------------------------------------------- writing


def show(number, digits=4):
    """A number for a table: `digits` after the point, thin dash where there is none."""
    if number is None or not math.isfinite(number):
        return "–"
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0"


def digits_of(metric):
    return {"nats/token": 4, "tokens": 1, "s": 1, "%": 1}.get(METRICS[metric][0], 2)


def main_markdown(main):
    """The main table for people, arms as columns: mean [95 % interval over seeds]."""
    arms = main.set_index("arm").to_dict("index")
    heads = [f"{arm} ({row['n_seeds']})" for arm, row in arms.items()]
    lines = ["| metric, unit | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, (unit, _) in METRICS.items():
        if main[name].notna().any():
            cells = [_with_interval(row, name) for row in arms.values()]
            lines.append(f"| `{name}`, {unit} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In brackets behind an arm: its number of seeds."]) + "\n"


def _with_interval(row, name):
    digits = digits_of(name)
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    span = f" [{show(low, digits)}, {show(high, digits)}]" if math.isfinite(low) else ""
    return show(row[name], digits) + span


def claims_markdown(rows):
    """The ledger for people: estimate [interval], verdict, the paper's value."""
    lines = ["| claim | treatment - control [95 % CI] | verdict | paper |", "|---|---|---|---|"]
    for row in rows:
        digits = digits_of(row["metric"])
        span = f"[{show(row['ci_low'], digits)}, {show(row['ci_high'], digits)}]"
        number = f"{row['metric']} {show(row['estimate'], digits)} {span} {row['unit']}"
        lines.append(f"| {row['claim']} | {number} | {row['verdict']} | {row['paper']} |")
    return "\n".join(lines) + "\n"


def readme_block(folder):
    """The README's results section of a promoted profile's folder, all of it from its files."""
    runs = load_runs(folder / "runs").values()
    about = [run["provenance"] for run in runs]
    minutes = sum(one["seconds"] for one in about) / 60
    minutes += sum(r["scores"]["provenance"]["seconds"] for r in runs if r["log"] is not None) / 60
    ledger = json.loads((folder / "claims.json").read_text("utf-8"))
    first = ledger[0]
    figure = f"results/reference/{folder.name}/figures/05_confirmatory.png"
    numbers = [show(first[name], 4) for name in ("estimate", "ci_low", "ci_high")]
    return f"""\
The claim: *{first["claim"]}* **{first["verdict"].capitalize()}**: {first["contrast"]} is
{numbers[0]} [{numbers[1]}, {numbers[2]}] {first["unit"]}, {first["metric"]}, over paired seeds.

![{first["contrast"]}, test NLL per seed, mean and interval: {first["verdict"]}]({figure})

Profile `{folder.name}`, {len(about)} runs at commit `{about[0]["commit"][:12]}`,
{about[0]["device"]}:
{minutes:.0f} minutes of one core, {max(one["peak_memory_gb"] for one in about):.1f} GB a run.

{(folder / "tables" / "main.md").read_text("utf-8")}
{(folder / "tables" / "claims.md").read_text("utf-8")}"""


def write_tables(profile, runs, paths):
    """Compute and write tables/*.csv|md and claims.json; returns them as a dict."""
    decoding = decoding_name(profile.evaluate.repetition_penalty)
    seeds = by_seed(runs, decoding)
    arms = [arm for arm in (BASE, *profile.arms) if arm in set(seeds.arm)]
    main = main_table(seeds, arms)
    table = contrasts(runs, seeds, profile, decoding)
    ledger = claims(table, profile)
    for name, frame in (("by_seed", seeds), ("main", main), ("contrasts", table)):
        provenance.write_csv(paths.tables / f"{name}.csv", frame)
    provenance.atomic_write_text(paths.tables / "main.md", main_markdown(main))
    provenance.atomic_write_text(paths.tables / "claims.md", claims_markdown(ledger))
    provenance.write_json(paths.results / "claims.json", ledger)
    return {"by_seed": seeds, "main": main, "contrasts": table, "claims": ledger}
