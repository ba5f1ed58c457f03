"""Many runs, one tidy table: per-item files in, means and contrasts of arms out.

The unit is the seed pair: a treatment and a control run that share seed, training subset,
data order, dropout and LoRA initialisation. Every number here is computed from per-item
files (`losses.csv`, `generations.jsonl`) and provenance, never typed.
"""

import dataclasses
import json
import math

import pandas as pd

from neft_utils import length_control, stats
from neft_utils.config import BASE, LEADERBOARD, REFERENCE, ConfigError, Paths, load_profile
from neft_utils.expected import EVIDENCE
from neft_utils.preflight import PYTHON, pins
from neft_utils.provenance import read_json
from neft_utils.sources import read_jsonl

# Metric -> (unit, what it is). The order is the order of the tables' columns.
METRICS = {
    "test_nll": ("nats/token", "response NLL on test rows, noise off"),
    "ood_nll": ("nats/token", "response NLL on MT-Bench reference answers"),
    "train_nll": ("nats/token", "response NLL on the run's own training rows, noise off"),
    "gap": ("nats/token", "test NLL minus train NLL"),
    "best_validation_nll": ("nats/token", "lowest validation NLL over epochs (exploratory)"),
    "answer_tokens": ("tokens", "length of greedy answers, repetition penalty 1.2"),
    "stop_rate": ("share", "answers that ended by themselves"),
    "p_end": ("share", "probability of the end of turn where the reference answer ends"),
    "two_gram_repetition": ("%", "repeated word pairs, paper's chunk rule"),
    "log_diversity": ("nats", "diversity of 2- to 4-grams, paper's variant"),
    "rouge_l": ("share", "ROUGE-L to the reference answers"),
    "train_rouge_l": ("share", "ROUGE-L of answers to training prompts to the training answers"),
    "train_bleu": ("share", "BLEU of the same"),
    "verifiable_length_up": ("share", "verifiable instructions that ask for more, fulfilled"),
    "verifiable_length_down": ("share", "verifiable instructions that ask for less, fulfilled"),
    "verifiable_neutral": ("share", "verifiable instructions about form, fulfilled"),
    "openbookqa": ("share", "OpenBookQA, length-normalised accuracy"),
    "siqa": ("share", "SIQA, length-normalised accuracy"),
    "knowledge": ("nats", "log-probability of the right option, OpenBookQA and SIQA"),
    "arithmetic": ("nats", "log-probability of the right answer, ASDiv"),
    "weight_rise": ("nats/token", "rise of test NLL under relative weight perturbation"),
    "typo_rise": ("nats/token", "rise of test NLL under typos in the prompt"),
    **{name: ("share", f"{name}, as the Open LLM Leaderboard scores it") for name in LEADERBOARD},
    "preference": ("points", "judged better than the reference answer, per cent"),
    "alpaca_eval": ("points", "AlpacaEval: judged better than text_davinci_003, per cent"),
    "train_seconds": ("s", "time of the optimiser steps"),
    "answer_seconds": ("s", "time to answer the test prompts"),
}
# Per-item metrics: (file, the rows that count, the item's name, its value). Items are common to
# all arms of a seed, so that arms are compared item by item.
_PENALISED = "decoding == @decoding and set == 'test'"
ITEMS = {
    "test_nll": ("losses", "split == 'test'", "example_id", "nll"),
    "ood_nll": ("losses", "split == 'ood'", "example_id", "nll"),
    "answer_tokens": ("generations", _PENALISED, "example_id", "n_tokens"),
    "stop_rate": ("generations", _PENALISED, "example_id", "stopped"),
    "p_end": ("stopping", "p_end == p_end", "example_id", "p_end"),
    **{
        f"verifiable_{family}": (
            "task_items",
            f"task == 'verifiable_{family}'",
            "item_id",
            "correct",
        )
        for family in ("length_up", "length_down", "neutral")
    },
    "openbookqa": ("task_items", "task == 'openbookqa'", "item_id", "correct_norm"),
    "siqa": ("task_items", "task == 'siqa'", "item_id", "correct_norm"),
    "knowledge": ("task_items", "task in ('openbookqa', 'siqa')", "item_id", "gold_logprob"),
    "arithmetic": ("task_items", "task == 'asdiv'", "item_id", "gold_logprob"),
    **{name: ("task_items", f"task == '{name}'", "item_id", "correct") for name in LEADERBOARD},
    **{
        name: ("preferences", f"set == '{one}'", "example_id", "preference")
        for name, one in (("preference", "test"), ("alpaca_eval", "alpaca_eval"))
    },
}
JUDGED = ("preference", "alpaca_eval")
RISES = {"weight_rise": "weights", "typo_rise": "prompt"}  # kinds of perturbed_losses.csv
FILES = ("losses", "task_items", "perturbed_losses", "stopping", "preferences")


def open_results(profile, out):
    """(Profile, Paths to write to, runs): local results of the profile, else stored ones.

    Falls back to results/reference of the profile, then of those in `expected.EVIDENCE`, and
    says so; what is computed from them still goes to `out`. A reference of smoke is there for
    its expected values, not to be read: the evidence comes before it. ConfigError for nothing.
    """
    stored = [(name, REFERENCE) for name in EVIDENCE]
    stored.insert(len(stored) if profile == "smoke" else 0, (profile, REFERENCE))
    for name, folder in ((profile, out), *stored):
        loaded = load_profile(name)
        found = Paths(loaded.name, folder).results / "runs"
        wanted = (loaded.confirmatory.treatment, loaded.confirmatory.control)
        if all(list(found.glob(f"{arm}-s*/scores.json")) for arm in wanted):
            if (name, folder) != (profile, out):
                print(f"no finished {profile} runs in {out}: reading {folder}/{loaded.name}")
            runs = load_runs(found)  # without those of an earlier version of the profile
            runs = {run: runs[run] for run in [(BASE, 0), *loaded.runs()] if run in runs}
            return loaded, Paths(loaded.name, out), runs
    raise ConfigError(f"no finished runs of {profile}: run make reproduce PROFILE={profile} first")


def load_runs(folder):
    """{(arm, seed): run} of the finished runs below `folder`.

    A run is a dict: scores and provenance, `generations` and each of FILES as DataFrames (empty
    where nothing was asked), and `noise` and `log` (train_log.csv) for trained ones.
    """
    runs = {}
    for scores in sorted(folder.glob("*/scores.json")):
        run = scores.parent
        about = json.loads((run / "provenance.json").read_text("utf-8"))
        if missing := [name for name in FILES if not (run / f"{name}.csv").exists()]:
            raise ConfigError(
                f"run {run.name} has no {', '.join(missing)}: an older version of the code scored"
                " it, or files were deleted: run make reproduce"
            )
        log = run / "train_log.csv"
        runs[about["arm"], about["seed"]] = {
            "scores": json.loads(scores.read_text("utf-8")),
            "provenance": about,
            **{name: pd.read_csv(run / f"{name}.csv", dtype=_NAMES) for name in FILES},
            "generations": pd.DataFrame(read_jsonl(run / "generations.jsonl")),
            "noise": read_json(run / "noise.json"),
            "log": pd.read_csv(log) if log.exists() else None,
        }
    return runs


_NAMES = {"example_id": str, "item_id": str}


def per_item(run, name, decoding):
    """A metric of one run item by item, a Series by item name; None where it has none."""
    if name in RISES:
        return _rise(run["perturbed_losses"], RISES[name])
    if name not in ITEMS or run[ITEMS[name][0]].empty:
        return None
    table, rows, item, value = ITEMS[name]
    found = run[table].query(rows, local_dict={"decoding": decoding})
    if found.empty:
        return None
    if table == "task_items":  # several tasks may number their items alike
        found = found.assign(item_id=found.task + "/" + found.item_id)
    values = found.set_index(item)[value].astype(float).dropna()
    return values * 100 if name in JUDGED else values


def _rise(perturbed, kind):
    """NLL under the perturbation, mean over its levels, minus NLL without; by example."""
    if perturbed.empty:
        return None
    means = perturbed.groupby(["kind", "example_id"]).nll.mean()
    return means[kind] - means["none"]


def missing_runs(profile, runs):
    """Names of the profile's runs, the untrained model's included, that are not among `runs`."""
    return [f"{a}-s{s}" for a, s in [(BASE, 0), *profile.runs()] if (a, s) not in runs]


def caveats(profile, runs):
    """What every table of these runs must say of itself, a sentence each: which runs are missing,
    and which of the packages that provenance records were not the pinned ones."""
    out = []
    if lost := missing_runs(profile, runs):
        models = [(BASE, 0), *profile.runs()]
        whole = len(models)
        listed = f"{len(lost)} of {whole} runs are missing, {', '.join(lost)}"
        if len(lost) > whole / 2:
            there = ", ".join(f"{arm}-s{seed}" for arm, seed in models if (arm, seed) in runs)
            listed = f"{len(runs)} of {whole} runs are there, {there}"
        out.append(
            f"Not complete: {listed}. Arms are compared on the seeds that both have, so a contrast"
            " is not the difference of two arms' means."
        )
    wanted = pins()
    other = {
        f"{name} {version} (pinned: {wanted[name]})"
        for run in runs.values()
        for name, version in run["provenance"]["versions"].items()
        if version is not None and version.split("+")[0] != wanted.get(name, version)
    }
    other |= {
        f"Python {run['provenance']['python']} (pinned: {PYTHON})"
        for run in runs.values()
        if not run["provenance"]["python"].startswith(f"{PYTHON}.")
    }
    if other:
        out.append(f"Other versions than the pinned ones: {', '.join(sorted(other))}.")
    engines = {engine_of(run) for run in runs.values() if len(run["generations"])}
    if len(engines) > 1:
        out.append(
            f"Answers of different engines ({', '.join(sorted(engines))}), which round differently:"
            " runs differ by that too."
        )
    return out


def engine_of(run):
    """What answered a run's prompts; transformers, before there was a choice."""
    return run["scores"]["provenance"].get("answer_engine", "transformers")


def by_seed(runs, decoding):
    """One row per run: arm, seed and METRICS. decoding: the answers' decoding to report."""
    rows = []
    for (arm, seed), run in runs.items():
        scores, row = run["scores"], {"arm": arm, "seed": seed}
        for name in METRICS:
            items = per_item(run, name, decoding)
            if items is not None:
                row[name] = items.mean()
                continue
            where = f"train/{decoding}/" if name.startswith("train_") else f"{decoding}/"
            row[name] = scores.get(name, scores.get(where + name.removeprefix("train_")))
        row["answer_seconds"] = scores["provenance"]["phase_seconds"]["answers"] or None
        if {"test_long_prompt", "test_min_tokens", "test_cut"} & _sets(run["generations"]):
            row["answer_seconds"] = None  # the control answered more than the others
        if engine_of(run) != "transformers":
            row["answer_seconds"] = None  # looked up: one engine answered for all runs at once
        if run["log"] is not None:
            row["best_validation_nll"] = run["log"].validation_nll.min()
            row["train_seconds"] = run["provenance"]["train_seconds"]
        rows.append(row)
    return pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))


def _sets(generations):
    return set(generations["set"]) if len(generations) else set()


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


def paired(runs, treatment, controls, name, decoding):
    """DataFrame seed, example_id, delta: a per-item metric, treatment minus the controls' mean.

    Only seeds that every arm has and that were asked. None if there are none. ConfigError if
    arms of a seed were asked different items (an answer that a judge left out drops its pair).
    """
    frames, arms = [], (treatment, *controls)
    for seed in _common_seeds(runs, arms):
        sides = [per_item(runs[arm, seed], name, decoding) for arm in arms]
        if any(side is None for side in sides):
            continue
        if name not in JUDGED and any(set(side.index) != set(sides[0].index) for side in sides):
            raise ConfigError(f"{name}: {' and '.join(arms)} of seed {seed} have different items")
        delta = (sides[0] - sum(sides[1:]) / len(controls)).dropna()
        frames.append(pd.DataFrame({"seed": seed, "example_id": delta.index, "delta": delta.array}))
    return pd.concat(frames, ignore_index=True) if frames else None


def _common_seeds(runs, arms):
    return sorted(set.intersection(*({s for a, s in runs if a == arm} for arm in arms)))


def contrast(runs, seeds, treatment, controls, name, decoding):
    """stats.Interval of treatment minus the controls' mean in a metric, or None without values.

    Per-item metrics use the two-way interval over seeds and items; others, and train rows (each
    seed has its own), the t interval over seed pairs.
    """
    deltas = paired(runs, treatment, controls, name, decoding)
    if deltas is not None:
        whole = deltas.groupby("example_id").seed.transform("size") == deltas.seed.nunique()
        if whole.any():
            return stats.confirmatory_interval(deltas[whole])
    wide = seeds[seeds.arm.isin([treatment, *controls])]
    wide = wide.pivot(index="seed", columns="arm", values=name)
    if not {treatment, *controls} <= set(wide.columns):
        return None
    wide = wide.dropna()
    values = (wide[treatment] - wide[list(controls)].mean(axis=1)).to_numpy()
    return stats.seed_interval(values) if len(values) else None


def contrasts(runs, seeds, profile, decoding):
    """Every arm against its control in every metric: tidy DataFrame with intervals.

    p and verdict are not corrected for how many there are: they say where to look.
    """
    rows = []
    for arm in profile.arms:
        control = profile.control_of(arm)
        for name, (unit, _) in METRICS.items() if arm != control else ():
            interval = contrast(runs, seeds, arm, [control], name, decoding)
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


def length_views(runs, treatment, control):
    """Judged preference with length answered every way: DataFrame view, seed, estimate (points).

    Treatment minus control per seed: `raw`, the forms of `length_control` at equal length,
    `matched_0.5`, and the arms of the paper's Table 5: the control asked for or forced to long
    answers, the treatment's answers cut to the control's, each minus the plain control. Empty
    without a judge's preferences.
    """
    rows = []
    for seed in _common_seeds(runs, (treatment, control)):
        judged = [runs[arm, seed]["preferences"] for arm in (control, treatment)]
        if any(one.empty for one in judged):
            continue
        plain = [
            one[one["set"] == "test"].rename(columns={"example_id": "prompt_id"}) for one in judged
        ]
        pairs = length_control.pair_arms(*plain)
        rows.append(("raw", seed, length_control.raw_difference(pairs)["estimate"]))
        for form in length_control.FORMS:
            low, high = length_control.win_rates_at_equal_length(pairs, form)[0]
            rows.append((form, seed, high - low))
        matched = length_control.length_matched(pairs, [0.5]).iloc[0]
        rows.append(("matched_0.5", seed, matched.estimate))
        base = plain[0].set_index("prompt_id").preference
        for name in ("test_long_prompt", "test_min_tokens", "test_cut"):
            side = judged[name == "test_cut"]
            other = side[side["set"] == name].set_index("example_id").preference
            if len(other):
                rows.append((name, seed, 100 * (other - base).mean()))
    return pd.DataFrame(rows, columns=["view", "seed", "estimate"])


def side_by_side(runs, arms, prompts, longest=500):
    """Answers of several arms to the shown prompts: DataFrame, a row a prompt, a column an arm.

    arms: names; of each the first seed that answered, which the column names. prompts: texts in
    the order of the profile's `shown_prompts`. longest: characters after which text is cut.
    """
    columns = {}
    for arm in arms:
        for (name, seed), run in sorted(runs.items()):
            rows = run["generations"]
            answers = rows[rows["set"] == "shown"].set_index("example_id") if len(rows) else rows
            if name == arm and len(answers):
                texts = [answers.text.get(f"shown-{n}", "") for n in range(len(prompts))]
                columns[f"{arm}, seed {seed}"] = [
                    text if len(text) <= longest else text[:longest] + "…" for text in texts
                ]
                break
    return pd.DataFrame(columns, index=pd.Index(prompts, name="prompt"))


# -------------------------------------------------------------------------------- writing


def show(number, digits=4):
    """A number for a table: `digits` after the point, thin dash where there is none."""
    if number is None or not math.isfinite(number):
        return "–"
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0"


def digits_of(unit):
    return {"nats/token": 4, "tokens": 1, "s": 1, "%": 1, "points": 1, "lines": 0}.get(unit, 2)


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
    digits = digits_of(METRICS[name][0])
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    span = f" [{show(low, digits)}, {show(high, digits)}]" if math.isfinite(low) else ""
    return show(row[name], digits) + span
