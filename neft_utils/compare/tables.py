"""Many runs, one tidy table: per-item files in, means and contrasts of arms out.

The unit is the seed pair: a treatment and a control run that share seed, training subset,
data order, dropout and LoRA initialisation.
"""

import dataclasses
import math
from dataclasses import dataclass

import pandas as pd

from neft_utils.base.strict import ConfigError
from neft_utils.compare import length_control, length_pairs, stats
from neft_utils.compare.metrics import (
    MAY_LACK,
    METRICS,
    OWN_ROWS,
    REWARDED,
    mean,
    per_item,
    quantity,
)
from neft_utils.compare.runs import engine_of
from neft_utils.compare.words import LOG_RATIO, digits_of, show, verdict


@dataclass(frozen=True)
class Contrast:
    """Which arms a difference is of: the treatment minus the mean of its controls."""

    treatment: str
    controls: tuple[str, ...]

    @property
    def arms(self):
        return (self.treatment, *self.controls)

    def __str__(self):
        return f"{self.treatment} - {' & '.join(self.controls)}"


def by_seed(runs, decoding):
    """One row per run: arm, seed and METRICS, in the order of `runs`.

    runs: from `runs.load_runs`, here and below. decoding: the answers' decoding to report. Columns
    of rewards are there only where a run has any: tables of older versions have none.
    """
    rows = []
    for (arm, seed), run in runs.items():
        scores, row = run["scores"], {"arm": arm, "seed": seed}
        for name in METRICS:
            items = per_item(run, name, decoding)
            if items is not None:
                row[name] = mean(items)
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
    table = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    return table.drop(columns=[name for name in REWARDED if table[name].isna().all()])


def _sets(generations):
    return set(generations["set"]) if len(generations) else set()


def main_table(seeds, arms):
    """One row per arm that has runs: mean over seeds of each metric, its t interval, and n_seeds.

    The intervals say where another seed's run would move the mean, not whether arms differ:
    arms share their seeds, so compare them by `contrasts`.
    """
    rows = []
    for arm in arms:
        group = seeds[seeds.arm == arm]
        if group.empty:
            continue
        row = {"arm": arm}
        for name in (one for one in METRICS if one in seeds):
            values = group[name].dropna().to_numpy()
            one = stats.seed_interval(values) if len(values) else None
            row[name] = one.estimate if one else math.nan
            row[f"{name}_ci_low"] = one.ci_low if one else math.nan
            row[f"{name}_ci_high"] = one.ci_high if one else math.nan
        rows.append({**row, "n_seeds": len(group)})
    return pd.DataFrame(rows)


def paired(runs, pair, name, decoding):
    """DataFrame seed, example_id, delta, weight: a metric, treatment minus the controls' mean.

    pair: a `Contrast`. Only seeds that every arm has and that were asked. None if there are none.
    ConfigError if arms of a seed have different items, or items of different length (an answer
    that a judge or a reward model left out drops its pair).
    """
    frames = []
    for seed in _common_seeds(runs, pair):
        sides = [per_item(runs[arm, seed], name, decoding) for arm in pair.arms]
        if any(side is None for side in sides):
            continue
        if name not in MAY_LACK:
            _refuse_unlike(sides, pair, seed, name)
        values = [side.value for side in sides]
        delta = (values[0] - sum(values[1:]) / len(pair.controls)).dropna()
        columns = {"seed": seed, "example_id": delta.index, "delta": delta.array}
        weight = sides[0].weight.reindex(delta.index).array
        frames.append(pd.DataFrame({**columns, "weight": weight}))
    return pd.concat(frames, ignore_index=True) if frames else None


def _refuse_unlike(sides, pair, seed, name):
    for arm, side in zip(pair.arms, sides, strict=True):
        first = sides[0]
        unlike = sorted(map(str, set(side.index) ^ set(first.index)))
        what = "different items"
        if not unlike:
            unlike = list(side.index[side.weight != first.weight.reindex(side.index)])
            what = "items of different length"
        if unlike:
            raise ConfigError(
                f"{name}: {pair.treatment} and {arm} of seed {seed} have {what}, such as"
                f" {unlike[0]}: score both on the same rows (notebook 04)"
            )


def _common_seeds(runs, pair):
    return sorted(set.intersection(*({s for a, s in runs if a == arm} for arm in pair.arms)))


def contrast(runs, seeds, pair, name, decoding):
    """stats.Interval of a `Contrast` in a metric, or None without values.

    Per-item metrics use the two-way interval over seeds and items; others, and train rows (each
    seed has its own), the t interval over seed pairs. seeds: `by_seed(runs, decoding)`.
    """
    deltas = paired(runs, pair, name, decoding) if name not in OWN_ROWS else None
    found = None if deltas is None else two_way(deltas)
    if found is not None or name not in seeds:
        return found
    wide = seeds[seeds.arm.isin(pair.arms)].pivot(index="seed", columns="arm", values=name)
    if not set(pair.arms) <= set(wide.columns):
        return None
    wide = wide.dropna()
    values = (wide[pair.treatment] - wide[list(pair.controls)].mean(axis=1)).to_numpy()
    return stats.seed_interval(values) if len(values) else None


def two_way(deltas, level=0.95):
    """`stats.confirmatory_interval` of `paired` differences, over the items that all seeds have;
    None without such an item."""
    whole = deltas.groupby("example_id").seed.transform("size") == deltas.seed.nunique()
    return stats.confirmatory_interval(deltas[whole], level) if whole.any() else None


def contrasts(runs, seeds, profile, decoding):
    """Every arm against its control in every metric but times: tidy DataFrame with intervals.

    p and verdict (a `words.Verdict`, whose words a CSV gets) are not corrected for how many there
    are: they say where to look. Runs had neighbours, so their times are no measurement.
    """
    rows = []
    for arm in profile.arms:
        control = profile.control_of(arm)
        for name, (unit, _) in METRICS.items() if arm != control else ():
            if unit == "s":
                continue
            interval = contrast(runs, seeds, Contrast(arm, (control,)), name, decoding)
            if interval is not None:
                rows.append(
                    {
                        "treatment": arm,
                        "control": control,
                        "metric": name,
                        "unit": unit,
                        **dataclasses.asdict(interval),
                        "p": stats.p_value(interval),
                        "verdict": verdict(interval, quantity(name)),
                    }
                )
    return pd.DataFrame(rows)


def length_views(runs, pair):
    """Judged preference with length answered every way: DataFrame view, seed, estimate (points).

    pair: a `Contrast` with one control. Per seed: `raw`, the forms of `length_control`,
    `matched_0.5`, and the arms of the paper's Table 5: the control asked for or forced to long
    answers, the treatment's answers cut to the control's, each minus the plain control. Empty
    without a judge's preferences.
    """
    rows = []
    for seed in _common_seeds(runs, pair):
        judged = [runs[arm, seed]["preferences"] for arm in reversed(pair.arms)]
        if any(one.empty for one in judged):
            continue
        plain = [
            one[one["set"] == "test"].rename(columns={"example_id": "prompt_id"}) for one in judged
        ]
        pairs = length_pairs.pair_arms(*plain)
        rows.append(("raw", seed, length_pairs.raw_difference(pairs)["estimate"]))
        for form in length_control.FORMS:
            low, high = length_control.win_rates_at_equal_length(pairs, form)[0]
            rows.append((form, seed, high - low))
        matched = length_pairs.length_matched(pairs, [0.5]).iloc[0]
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


def escaped(frame):
    """A frame of texts that others wrote as a table to display: none of it is markup or formula,
    neither in cells nor in headings."""
    shown = frame.style.format(escape="html").format_index(escape="html")
    shown = shown.format_index(escape="html", axis="columns")
    shown = shown.set_table_attributes('class="tex2jax_ignore mathjax_ignore"')
    return shown.set_properties(**{"text-align": "left", "vertical-align": "top"})


# -------------------------------------------------------------------------------- writing


def main_markdown(main):
    """The main table for people, arms as columns: mean [95 % interval over seeds]."""
    arms = main.set_index("arm").to_dict("index")
    heads = [f"{arm} ({row['n_seeds']})" for arm, row in arms.items()]
    lines = ["| metric, unit | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, (unit, _) in METRICS.items():
        if name in main and main[name].notna().any():
            cells = [_with_interval(row, name) for row in arms.values()]
            shown = "tokens, geometric mean" if unit == LOG_RATIO else unit
            lines.append(f"| `{name}`, {shown} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In brackets behind an arm: its number of seeds."]) + "\n"


def _with_interval(row, name):
    unit = METRICS[name][0]
    value, low, high = (row[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high"))
    if unit == LOG_RATIO:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    digits = digits_of(unit)
    span = f" [{show(low, digits)}, {show(high, digits)}]" if math.isfinite(low) else ""
    return show(value, digits) + span
