"""The questions that people come with, each answered in one place from a profile's results.

Every function takes `compare.results.Results` and returns Markdown. Numbers and sentences come
from the runs' files; `published/` and coverage.csv are read as notebooks 6 and 5 left them.
The pages of docs/ show the answers for promoted profiles, and the report's index for any results.
"""

import json
import statistics

import pandas as pd

from neft_utils.base.files import ROOT, read_json
from neft_utils.base.paths import BASE, NOTEBOOKS, REFERENCE, STEPS
from neft_utils.compare import end_of_turn, facts, published_views
from neft_utils.compare.claims import claims_markdown, dose, only_alpha
from neft_utils.compare.expected import duration, notebook_seconds
from neft_utils.compare.metrics import METRICS
from neft_utils.compare.tables import Contrast, main_markdown
from neft_utils.compare.words import digits_of, plain, show, size, with_interval
from neft_utils.make.front import described, filled, lines_of


def certainty(results):
    """How far the primary answers reach, and what more seed pairs would find."""
    testable = [one for one in results.primary if one.verdict.testable]
    second = results.ledger["held_out_loss"]
    shown = testable or ([second] if second.verdict.testable else [])
    if not shown:
        return "One seed pair, so no interval: nothing to plan with.\n"
    sizes = sorted({(one.interval.n_seeds, one.interval.n_examples) for one in shown})
    text = " and ".join(f"{pairs} seed pairs with {rows} rows or answers" for pairs, rows in sizes)
    text = f"These intervals come from {text}."
    if (results.folder / "tables/coverage.csv").exists():
        rates = pd.read_csv(results.folder / "tables/coverage.csv")
        text += (
            f" In simulated experiments such a 95 % interval contains the truth in"
            f" {rates.interval.min():.0%} to {rates.interval.max():.0%} of them, with normal and"
            f" with heavy-tailed rows, equal and weighted by tokens; a bootstrap over seeds and"
            f" rows in as few as {rates.crossed_bootstrap.min():.0%}."
        )
    text += " What more seed pairs would find with the same number of test rows:"
    lines, heads = [], "smallest effect found four times out of five"
    for one in shown:
        plan, unit = results.plan(one.claim.metric), one.verdict.quantity.unit
        if not lines:
            lines = [f"| {heads} | " + " | ".join(f"{n} pairs" for n in plan.n_seeds) + " |"]
            lines += ["|---" * (1 + len(plan)) + "|"]
        cells = [show(x, digits_of(unit)) for x in (size(x, unit) for x in plan.detectable)]
        lines.append(f"| `{one.claim.metric}`, {plain(unit)} | " + " | ".join(cells) + " |")
    return "\n".join([filled(text), "", *lines, ""])


def length(results):
    """How much of the published gain is length: by models of the judge, and by changing length."""
    found = read_json(results.folder / "published/comparison.json")
    views = published_views.views(found, facts.leaderboard_pair())
    ours, judged = results.ledger["answer_length"], results.ledger["beyond_length"]
    text = (
        f"{published_views.by_model(found, views)} {published_views.by_force()} Our models'"
        f" answers: {_estimate(ours)}, *{ours.verdict}*. Whether they are better at equal length:"
        f" *{judged.verdict}*."
    )
    return f"{filled(text)}\n\n{published_views.as_markdown(views)}"


def length_picture(results):
    """The figure of the published gain over the change of length, as docs/length.md shows it."""
    name = "figures/06_length_change.png"
    path = results.folder / name
    if not path.exists():
        return ""
    return f"![{described(path)}](../{path.relative_to(ROOT)})\n"


def cost(results):
    """What noise costs in code, time and memory, and what one run of this profile takes."""
    folder = results.folder
    measured = (
        read_json(path) for path in (folder / "bench.json", ROOT / REFERENCE / "cpu/bench.json")
    )
    bench = next((one for one in measured if one), None)
    rows = [("lines to add to your training code", str(lines_to_add()))]
    if bench:
        share = f"{bench['noise_overhead_percent']:.1f} % (`make bench`, {bench['profile']})"
        rows.append(("drawing and adding the noise, share of a training step", share))
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


def lines_to_add():
    """Lines that notebook 7 has for the noise in its imports and in its cell of a Trainer."""
    source = json.loads((NOTEBOOKS / f"{STEPS[7]}.ipynb").read_text("utf-8"))
    cells = [cell for cell in source["cells"] if cell["id"] in ("07-02", "07-10")]
    code = [line for cell in cells for line in cell["source"]]
    return len({line.strip() for line in code if "NEFTuneCallback" in line or "callbacks=" in line})


def evidence(results):
    """What is seen among primary and other claims, the ledger, the table of all metrics by arm."""
    first = [f"- *{one.claim.text}* **{one.verdict.sentence}**" for one in results.primary]
    first = [line for one in first for line in lines_of(one, "  ")]
    rows = [row for row in results.ledger.values() if not (row.primary or row.claim.quotes)]
    tested = [row for row in rows if row.verdict.testable]
    found = [row for row in tested if row.verdict.seen]
    text = (
        f"Of {len(tested)} secondary claims that could be tested, {len(found)} show a difference."
    )
    differ = [f"- *{r.claim.text}* **{r.verdict.sentence}** {r.claim.note}" for r in found]
    differ = [line for one in differ for line in lines_of(one, "  ")]
    answer = "\n".join([*first, "", filled(text), "", *differ]).rstrip()
    tuned = f"\n{filled(fine_tuning(results))}\n" if fine_tuning(results) else ""
    notes = "".join(f"\n{one}\n" for one in results.caveats)
    return f"""\
{answer}

{claims_markdown(results.ledger.values())}{tuned}{notes}
<details><summary>All metrics by arm</summary>

{main_markdown(results.main)}{notes}
</details>
"""


def fine_tuning(results):
    """What fine-tuning alone does to following instructions, in a sentence; "" where unmeasured."""
    names = [name for name in results.seeds if name.startswith("verifiable_")]
    control = results.profile.confirmatory.control
    means = results.seeds.groupby("arm")[names].mean()
    if not {BASE, control} <= set(means.index):
        return ""
    both = means.loc[[BASE, control]].dropna(axis=1)
    said = [f"`{name}` {both[name][BASE]:.2f} to {both[name][control]:.2f}" for name in both]
    if not said:
        return ""
    text = "Fine-tuning alone, without noise, changes how often instructions are followed"
    return f"{text}: {', '.join(said)}."


def overlap(results):
    """How many test rows stored profiles share, lest they be taken for separate evidence."""
    rows, said = {results.folder.name: _test_rows(results.folder)}, []
    for folder in sorted((ROOT / REFERENCE).iterdir()):
        if folder.name not in rows and (other := _test_rows(folder)):
            (name, mine), *_ = rows.items()
            both, pair = len(mine & other), f"`{name}` ({len(mine)}) and `{folder.name}`"
            said.append(f"{pair} ({len(other)}): {both or 'none'}")
    if not said:
        return "No other profile has stored results.\n"
    return filled(f"Test rows in common: {'; '.join(said)}.") + "\n"


def _test_rows(folder):
    """Ids of the test rows that the untrained model was scored on; an empty set without it."""
    path = folder / "runs" / f"{BASE}-s0" / "losses.csv"
    if not path.exists():
        return set()
    return set(pd.read_csv(path).query("split == 'test'").example_id)


def curve(results):
    """The held-out loss by size of the noise, with what is missing, and the answers' length."""
    profile, runs = results.profile, results.runs
    first, longer = results.ledger["held_out_loss"], results.ledger["answer_length"]
    device = sorted({run["provenance"]["device"] for run in runs.values()})
    text = f"On {' and '.join(device)}, {profile.data.train_rows:,} training rows a seed"
    if first.interval is None:
        return f"{text}: no pair of runs is complete.\n"
    text += f", {first.interval.n_seeds} seed pairs and {first.interval.n_examples} test rows."
    text += f" Held-out loss: {_estimate(first)}, {first.verdict}."
    text += f" Length of the answers: {longer.verdict}."
    lines = [filled(text), ""]
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
            pairs, number = one.n_seeds, _number(one, first.claim.metric)
        cells = (f"{change.noise_alpha:g}", f"{statistics.mean(shares):.2f}", len(shares), pairs)
        lines.append("| " + " | ".join(map(str, (*cells, number))) + " |")
    return "\n".join([*lines, *_notes(results)]) + "\n"


def by_arm(results):
    """What every arm does to the end of turn, in quarters of the answers' length, and to content.

    A row an arm, against its control. ConfigError where no run has end_nll.
    """
    profile = results.profile
    arms = [arm for arm in profile.arms if arm != profile.control_of(arm)]
    changes = end_of_turn.changes_of_runs(results.runs, profile, arms)
    quarters = end_of_turn.by_length(changes)
    quarters = quarters[quarters.seed.isna() & (quarters.measure == "end_nll")]
    lengths = quarters.groupby("part").length.median()
    heads = [f"answers of about {length:.0f} tokens" for length in lengths]
    heads = ["arm", "pairs", "end of turn, nats", *heads, "content, nats per token"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, rows in changes.groupby("label", sort=False):
        end, content = (end_of_turn.interval(rows, one) for one in ("end_nll", "content_nll"))
        parts = quarters[quarters.label == arm].sort_values("part").itertuples()
        cells = [_number(one, "end_nll") for one in (end, *parts)]
        cells = (f"`{arm}`", str(rows.seed.nunique()), *cells, _number(content, "content_nll"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(interval, metric):
    """A difference with its ends and without its unit, which stands in the table's head."""
    unit = METRICS[metric][0]
    return with_interval(interval, unit).removesuffix(f" {plain(unit)}")


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


# What the pages of docs/ show.
ANSWERS = (certainty, length, length_picture, cost, evidence, overlap, curve, by_arm, rules)


def _notes(results):
    """The caveats, a paragraph each."""
    return [f"\n{filled(str(one))}" for one in results.caveats]


def _estimate(row):
    """The difference of a `Finding` with its interval, or why there is none."""
    if row.interval is None:
        return str(row.verdict)
    return with_interval(row.interval, row.verdict.quantity.unit)
