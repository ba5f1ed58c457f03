"""The questions that people come with, each answered in one place from a profile's results.

Every function takes `compare.results.Results` and returns Markdown. Numbers and verdicts come
from the runs' files; `published/` and type_one_error.csv are read as notebooks 6 and 5 left them.
The README shows the answers for the promoted profiles, and the report's index for any results.
"""

import math
import statistics
import textwrap

import pandas as pd

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, REFERENCE
from neft_utils.compare import facts, published_views
from neft_utils.compare.claims import claims_markdown, dose, only_alpha
from neft_utils.compare.expected import duration, notebook_seconds
from neft_utils.compare.tables import Contrast, digits_of, main_markdown, show


def headline(results):
    """The verdict; table paper | public leaderboard | ours, without noise and with."""
    paper = facts.paper_results().query("train_data == 'Alpaca' and table in ('1/7', '4')")
    wins = paper.query("metric == 'win_rate_vs_davinci003'").value.tolist()
    chars = paper.query("metric == 'response_chars'").value.tolist()
    pair = facts.leaderboard_pair()
    found = read_json(results.folder / "published/comparison.json")
    raw = (found["raw_difference"], *found["raw_ci"]) if found else ()
    board = "Leaderboard: the authors' Alpaca model beside another"
    rows = [
        ("Paper: LLaMA-2-7B on Alpaca, one seed; win rate, %", *_sides(wins, 2)),
        ("… length of its answers, characters", *_sides(chars, 0)),
        (f"{board}; win rate, %", *_sides(pair["raw"][:2], 1, *raw)),
        ("… the same, length-controlled, %", *_sides(pair["length_controlled"][:2], 1)),
    ]
    first = results.ledger["confirmatory"]
    pairs = first.interval.n_seeds if first.interval else 0
    for name, text in (
        ("confirmatory", f"**Ours**: {pairs} seed pairs; loss on test rows, "),
        ("less_overfitting", "… test loss minus training loss, "),
        ("longer_answers", "… length of the answers, "),
    ):
        row, unit = results.ledger[name], results.ledger[name].verdict.unit
        if row.interval is None:
            rows.append((text + unit, "–", "–", str(row.verdict)))
            continue
        wide = results.seeds.pivot(index="seed", columns="arm", values=row.claim.metric)
        without = wide[list(row.contrast.controls)].mean(axis=1)
        sides = pd.concat([without, wide[row.contrast.treatment]], axis=1).dropna()  # the pairs
        cells = _sides(sides.mean().tolist(), digits_of(unit), *_numbers(row))
        rows.append((text + unit, *cells[:2], f"{cells[2]}, {row.verdict}"))
    verdict = str(first.verdict)
    verdict = verdict[:1].upper() + verdict[1:]
    lines = [
        f"*{first.claim.text}* **{verdict}.**",
        "",
        "| | without noise | with noise | difference [95 % interval] |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, *_notes(results)]) + "\n"


def certainty(results):
    """How far the confirmatory answer reaches, and what more seed pairs would buy."""
    row = results.ledger["confirmatory"]
    one, unit = row.interval, row.verdict.unit
    if not row.verdict.testable:
        return f"One seed pair, so no interval: {row.verdict}.\n"
    digits = digits_of(unit)
    low, high, seen = (show(x, digits) for x in (one.ci_low, one.ci_high, one.detectable))
    rates = pd.read_csv(results.folder / "tables/type_one_error.csv")
    ours, bootstrap = rates.confirmatory.max(), rates.crossed_bootstrap.max()
    text = (
        f"{one.n_seeds} seed pairs and {one.n_examples} test rows give an interval from"
        f" {low} to {high} {unit}. An effect of {seen} {unit} would have been found four times out"
        f" of five. In simulated experiments without any effect such an interval excludes zero in"
        f" at most {ours:.0%} of them (nominal: 5 %), a bootstrap over seeds and rows in up to"
        f" {bootstrap:.0%}. What more seeds would buy, the test rows staying as many as they are:"
    )
    plan = results.plan
    found = f"smallest effect found four times out of five, {unit}"
    return "\n".join(
        [
            textwrap.fill(text, 96),
            "",
            "| seed pairs | " + " | ".join(map(str, plan.n_seeds)) + " |",
            "|---" * (1 + len(plan)) + "|",
            f"| {found} | " + " | ".join(show(x, digits) for x in plan.detectable) + " |",
            "",
        ]
    )


def length(results):
    """How much of the published gain is length: by models of the judge, and by changing length."""
    found = read_json(results.folder / "published/comparison.json")
    views = published_views.views(found, facts.leaderboard_pair())
    ours, judged = results.ledger["longer_answers"], results.ledger["beyond_length"]
    text = (
        f"{published_views.by_model(found, views)} {published_views.by_force()} Our models'"
        f" answers: {_estimate(ours)}, *{ours.verdict}*. Whether they are better at equal length:"
        f" *{judged.verdict}*."
    )
    return f"{textwrap.fill(text, 96)}\n\n{published_views.as_markdown(views)}"


def cost(results):
    """What noise costs in code, time and memory, and what one run of this profile takes."""
    folder, found = results.folder, results.ledger
    measured = (
        read_json(path) for path in (folder / "bench.json", ROOT / REFERENCE / "cpu/bench.json")
    )
    bench = next((one for one in measured if one), None)
    rows = [("lines to add to your training code", f"{found['few_lines'].estimate:.0f}")]
    if bench:
        share = f"{bench['noise_overhead_percent']:.1f} % (`make bench`, {bench['profile']})"
        rows.append(("drawing and adding the noise, share of a training step", share))
    rows += [
        ("training time, with noise minus without", _estimate(found["training_cost"])),
        (
            "time to answer the test prompts, with noise minus without",
            _estimate(found["inference_cost"]),
        ),
    ]
    for step, what in ((3, "one run, training"), (4, "one run, scoring and answering")):
        took = notebook_seconds(folder, step)
        if took:
            rows.append((what, f"{duration(statistics.median(took))} (median of {len(took)})"))
    about = [run["provenance"] for run in results.runs.values()]
    first = next((one for one in about if one["arm"] != BASE), about[0])
    memory = max(one["peak_memory_gb"] for one in about)
    device = f"{first['device']}, {first['threads']} thread a run, {memory:.1f} GB at most"
    lines = ["| | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join([*lines, "", f"On {device}."]) + "\n"


def evidence(results):
    """The answer in a sentence or two, the ledger, and the table of all metrics by arm."""
    first, *rest = (row for row in results.ledger.values() if row.id != "few_lines")
    tested = [row for row in rest if row.verdict.testable]
    found = [row for row in tested if row.verdict.detected]
    text = (
        f"Held-out loss, with noise minus without: {_estimate(first)}, **{first.verdict}**."
        f" Among the other claims a difference is detected for {len(found)} of {len(tested)} that"
        " could be tested."
    )
    differ = [f"- *{r.claim.text}* {_estimate(r)}, **{r.verdict}**. {r.claim.note}" for r in found]
    answer = "\n".join([textwrap.fill(text, 96), "", *differ]).rstrip()
    notes = "".join(f"\n{one}\n" for one in results.caveats)
    return f"""\
{answer}

{claims_markdown(results.ledger.values())}{notes}
<details><summary>All metrics by arm</summary>

{main_markdown(results.main)}{notes}
</details>
"""


def curve(results):
    """The confirmatory answer and the held-out loss by size of the noise, with what is missing."""
    profile, runs = results.profile, results.runs
    first, longer = results.ledger["confirmatory"], results.ledger["longer_answers"]
    device = sorted({run["provenance"]["device"] for run in runs.values()})
    text = f"On {' and '.join(device)}, {profile.data.train_rows:,} training rows a seed"
    if first.interval is None:
        return f"{text}: no pair of runs is complete.\n"
    text += (
        f", {first.interval.n_seeds} seed pairs and {first.interval.n_examples} test rows: held-out"
        f" loss, with noise minus without, {_estimate(first)}, **{first.verdict}**. Length of the"
        f" answers: {_estimate(longer)}, *{longer.verdict}*."
    )
    lines = [textwrap.fill(text, 96), ""]
    heads = "α | noise RMS / embedding RMS | runs | pairs | test loss minus control, nats/token"
    lines += [f"| {heads} |", "|---" * 5 + "|"]
    noisy = {arm: change for arm, change in profile.arms.items() if change.noise_alpha}
    for arm, change in sorted(noisy.items(), key=lambda item: item[1].noise_alpha):
        shares = [run["noise"]["relative_rms"] for (a, _), run in runs.items() if a == arm]
        if not shares or not only_alpha(change):
            continue
        pairs, number = 0, "–"
        one = results.contrast(Contrast(arm, (profile.control_of(arm),)), first.claim.metric)
        if one is not None:
            pairs, number = one.n_seeds, f"{one.estimate:+.4f}"
            if math.isfinite(one.ci_low):
                number += f" [{one.ci_low:+.4f}, {one.ci_high:+.4f}]"
        cells = (f"{change.noise_alpha:g}", f"{statistics.mean(shares):.2f}", len(shares), pairs)
        lines.append("| " + " | ".join(map(str, (*cells, number))) + " |")
    return "\n".join([*lines, *_notes(results)]) + "\n"


def rules(results):
    """Noise scaled by other lengths beside the paper's: how much arrives, and what it does.

    A row an arm, means over its seed pairs.
    """
    found = dose(results.runs, results.seeds, results.profile)
    names = ["noise_alpha", "effective_alpha", "relative_rms", "train_nll", "test_nll"]
    arms = found.groupby(["length", "arm"])
    means = arms[names].mean().assign(pairs=arms.size()).reset_index()
    heads = "length rule | α | α that arrives, median | noise RMS / embedding RMS | pairs"
    heads += " | training loss minus control | test loss minus control"
    lines = [f"| {heads} |", "|---" * 7 + "|"]
    for row in means.sort_values("relative_rms").itertuples():
        share, losses = f"{row.relative_rms:.2f}", f"{row.train_nll:+.4f} | {row.test_nll:+.4f}"
        sizes = f"{row.noise_alpha:g} | {row.effective_alpha:.1f} | {share} | {row.pairs}"
        lines.append(f"| {row.length} | {sizes} | {losses} |")
    return "\n".join([*lines, *_notes(results)]) + "\n"


# What the README can show; the report shows the first four.
ANSWERS = (headline, certainty, length, cost, evidence, curve, rules)


def _notes(results):
    """The caveats, a paragraph each."""
    return [f"\n{textwrap.fill(str(one), 96)}" for one in results.caveats]


def _sides(sides, digits, estimate=None, low=None, high=None):
    """Cells: value without, value with, difference with its interval.

    estimate: the difference, where it is not that of the sides.
    """
    without, noisy = sides
    estimate = noisy - without if estimate is None else estimate
    span = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{without:.{digits}f}", f"{noisy:.{digits}f}", f"{estimate:+.{digits}f}{span}"


def _numbers(row):
    """(estimate, low, high) of a `Finding`; the ends None where there is no interval."""
    if not row.verdict.testable:
        return row.estimate, None, None
    return row.estimate, row.interval.ci_low, row.interval.ci_high


def _estimate(row):
    estimate, low, high = _numbers(row)
    if estimate is None:
        return str(row.verdict)
    digits = digits_of(row.verdict.unit)
    span = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{estimate:+.{digits}f}{span} {row.verdict.unit}"
