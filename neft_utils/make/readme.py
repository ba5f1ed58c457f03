"""The questions that people come with, each answered in one place from a profile's files.

Everything here is Markdown made from `claims.json`, `tables/`, `published/` and provenance. The
README shows it for the promoted profiles, between comments that name block and profile, and the
report's index shows it for any results. A test holds the README against these functions.
"""

import math
import re
import statistics
import textwrap

import pandas as pd

from neft_utils.base.files import ROOT, atomic_write_text, read_json
from neft_utils.base.paths import BASE, NOTEBOOKS, REFERENCE, STEPS, Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import published
from neft_utils.compare.claims import dose, only_alpha
from neft_utils.compare.expected import duration, how_long, notebook_seconds
from neft_utils.compare.runs import load_runs
from neft_utils.compare.tables import digits_of, show
from neft_utils.make.bench.cpu import table as speed_table
from neft_utils.make.pages import claim_of
from neft_utils.make.promotion import PARTIAL

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (\w+):([\w-]+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def headline(folder):
    """The verdict; table paper | public leaderboard | ours, without noise and with."""
    paper = published.paper_results().query("train_data == 'Alpaca' and table in ('1/7', '4')")
    wins = paper.query("metric == 'win_rate_vs_davinci003'").value.tolist()
    chars = paper.query("metric == 'response_chars'").value.tolist()
    pair, found = published.leaderboard_pair(), read_json(folder / "published/comparison.json")
    raw = (found["raw_difference"], *found["raw_ci"]) if found else ()
    board = "Leaderboard: the authors' Alpaca model beside another"
    rows = [
        ("Paper: LLaMA-2-7B on Alpaca, one seed; win rate, %", *_sides(wins, 2)),
        ("… length of its answers, characters", *_sides(chars, 0)),
        (f"{board}; win rate, %", *_sides(pair["raw"][:2], 1, *raw)),
        ("… the same, length-controlled, %", *_sides(pair["length_controlled"][:2], 1)),
    ]
    claims, seeds = _claims(folder), pd.read_csv(folder / "tables/by_seed.csv")
    first = claims["confirmatory"]
    treatment, control = first["contrast"].split(" - ")
    contrasts = pd.read_csv(folder / "tables/contrasts.csv")
    one = contrasts.query("treatment == @treatment and metric == @first['metric']").iloc[0]
    pairs = int(one.n_seeds)
    for name, text in (
        ("confirmatory", f"**Ours**: {pairs} seed pairs; loss on test rows, "),
        ("less_overfitting", "… test loss minus training loss, "),
        ("longer_answers", "… length of the answers, "),
    ):
        row = claims[name]
        wide = seeds.pivot(index="seed", columns="arm", values=row["metric"])
        sides = wide[[control, treatment]].dropna().mean().tolist()  # of the pairs
        numbers = (row["estimate"], row["ci_low"], row["ci_high"])
        cells = _sides(sides, digits_of(row["unit"]), *numbers)
        rows.append((text + row["unit"], *cells[:2], f"{cells[2]}, {row['verdict']}"))
    verdict = first["verdict"][:1].upper() + first["verdict"][1:]
    lines = [
        f"*{first['claim']}* **{verdict}.**",
        "",
        "| | without noise | with noise | difference [95 % interval] |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, *_notes(folder)]) + "\n"


def certainty(folder):
    """How far the confirmatory answer reaches, and what more seed pairs would buy."""
    row = _claims(folder)["confirmatory"]
    contrasts = pd.read_csv(folder / "tables/contrasts.csv")
    treatment, control = row["contrast"].split(" - ")
    one = contrasts.query("treatment == @treatment and metric == @row['metric']").iloc[0]
    if row["ci_low"] is None:
        return f"One seed pair, so no interval: {row['verdict']}.\n"
    digits, unit = digits_of(row["unit"]), row["unit"]
    low, high, seen = (show(row[name], digits) for name in ("ci_low", "ci_high", "detectable"))
    rates = pd.read_csv(folder / "tables/type_one_error.csv")
    ours, bootstrap = rates.confirmatory.max(), rates.crossed_bootstrap.max()
    text = (
        f"{one.n_seeds:.0f} seed pairs and {one.n_examples:.0f} test rows give an interval from"
        f" {low} to {high} {unit}. An effect of {seen} {unit} would have been found four times out"
        f" of five. In simulated experiments without any effect such an interval excludes zero in"
        f" at most {ours:.0%} of them (nominal: 5 %), a bootstrap over seeds and rows in up to"
        f" {bootstrap:.0%}."
    )
    if not (folder / "tables/plan.csv").exists():  # results of an earlier version
        return textwrap.fill(text, 96) + "\n"
    text += " What more seeds would buy, the test rows staying as many as they are:"
    plan = pd.read_csv(folder / "tables/plan.csv")
    found = f"smallest effect found four times out of five, {unit}"
    return "\n".join(
        [
            textwrap.fill(text, 96),
            "",
            "| seed pairs | " + " | ".join(map(str, plan.n_seeds)) + " |",
            "|---" * (1 + len(plan)) + "|",
            f"| {found} | " + " | ".join(show(one, digits) for one in plan.detectable) + " |",
            "",
        ]
    )


def length(folder):
    """The published gain with length answered every way, and the length of our answers."""
    views = pd.read_csv(folder / "published/views.csv")
    found = read_json(folder / "published/comparison.json")
    claims, raw = _claims(folder), views[views.kind == "raw"].iloc[0]
    rest = views[views.kind != "raw"].estimate
    ours, judged = claims["longer_answers"], claims["beyond_length"]
    overlap = f" Effect at equal length: {found['overlap']['verdict']}." if found else ""
    text = (
        f"Of the published gain of {raw.estimate:+.1f} points between {rest.min():+.1f} and"
        f" {rest.max():+.1f} are left at equal length, by how length is held equal.{overlap} Our"
        f" models' answers: {_estimate(ours)}, *{ours['verdict']}*. Whether they are better at"
        f" equal length: *{judged['verdict']}*."
    )
    lines = [textwrap.fill(text, 96), ""]
    lines += ["| published answers: gain in win rate, points | | |", "|---|---|---|"]
    kinds = {
        "raw": "as judged",
        "official": "length-controlled by the leaderboard",
        "refit": "at equal length, our refit",
        "matched": "pairs of similar length",
    }
    for row in views.itertuples():
        span = f" [{row.ci_low:+.1f}, {row.ci_high:+.1f}]" if math.isfinite(row.ci_low) else ""
        count = "" if pd.isna(row.n) else f", {row.n:.0f} pairs"
        lines.append(f"| {row.view} | {kinds[row.kind]}{count} | {row.estimate:+.1f}{span} |")
    return "\n".join(lines) + "\n"


def cost(folder):
    """What noise costs in code, time and memory, and what one run of this profile takes."""
    claims = _claims(folder)
    measured = (
        read_json(path) for path in (folder / "bench.json", ROOT / REFERENCE / "cpu/bench.json")
    )
    bench = next((one for one in measured if one), None)
    about = [read_json(path) for path in folder.glob("runs/*/provenance.json")]
    trained = [one for one in about if one["arm"] != BASE]
    rows = [("lines to add to your training code", f"{claims['few_lines']['estimate']:.0f}")]
    if bench:
        share = f"{bench['noise_overhead_percent']:.1f} % (`make bench`, {bench['profile']})"
        rows.append(("drawing and adding the noise, share of a training step", share))
    rows += [
        ("training time, with noise minus without", _estimate(claims["training_cost"])),
        (
            "time to answer the test prompts, with noise minus without",
            _estimate(claims["inference_cost"]),
        ),
    ]
    for step, what in ((3, "one run, training"), (4, "one run, scoring and answering")):
        took = notebook_seconds(folder, step)
        if took:
            rows.append((what, f"{duration(statistics.median(took))} (median of {len(took)})"))
    memory = max(one["peak_memory_gb"] for one in about)
    device = (
        f"{trained[0]['device']}, {trained[0]['threads']} thread a run, {memory:.1f} GB at most"
    )
    lines = ["| | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join([*lines, "", f"On {device}."]) + "\n"


def evidence(folder):
    """The answer in a sentence or two, the ledger, and the table of all metrics by arm."""
    tables, claims = folder / "tables", _claims(folder)
    first, *rest = (row for row in claims.values() if row["id"] != "few_lines")
    tested = [row for row in rest if not row["verdict"].startswith("not testable")]
    found = [row for row in tested if row["verdict"].startswith("detected")]
    text = (
        f"Held-out loss, with noise minus without: {_estimate(first)}, **{first['verdict']}**."
        f" Among the other claims a difference is detected for {len(found)} of {len(tested)} that"
        " could be tested."
    )
    differ = [f"- *{r['claim']}* {_estimate(r)}, **{r['verdict']}**. {r['note']}" for r in found]
    answer = "\n".join([textwrap.fill(text, 96), "", *differ]).rstrip()
    return f"""\
{answer}

{(tables / "claims.md").read_text("utf-8")}
<details><summary>All metrics by arm</summary>

{(tables / "main.md").read_text("utf-8")}
</details>
"""


def curve(folder):
    """The confirmatory answer and the held-out loss by size of the noise, with what is missing."""
    profile, runs = load_profile(folder.name), load_runs(folder / "runs")
    claims, contrasts = _claims(folder), pd.read_csv(folder / "tables/contrasts.csv")
    found = {row.treatment: row for row in contrasts.query("metric == 'test_nll'").itertuples()}
    one, longer = found.get(profile.confirmatory.treatment), claims["longer_answers"]
    device = sorted({run["provenance"]["device"] for run in runs.values()})
    text = f"On {' and '.join(device)}, {profile.data.train_rows:,} training rows a seed"
    if one is None:
        return f"{text}: no pair of runs is complete.\n"
    text += (
        f", {one.n_seeds:.0f} seed pairs and {one.n_examples:.0f} test rows: held-out loss, with"
        f" noise minus without, {_estimate(claims['confirmatory'])},"
        f" **{claims['confirmatory']['verdict']}**. Length of the answers: {_estimate(longer)},"
        f" *{longer['verdict']}*."
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
        if arm in found:
            row = found[arm]
            pairs, number = row.n_seeds, f"{row.estimate:+.4f}"
            if math.isfinite(row.ci_low):
                number += f" [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
        cells = (f"{change.noise_alpha:g}", f"{statistics.mean(shares):.2f}", len(shares), pairs)
        lines.append("| " + " | ".join(map(str, (*cells, number))) + " |")
    return "\n".join([*lines, *_notes(folder)]) + "\n"


def rules(folder):
    """Noise scaled by other lengths beside the paper's: how much arrives, and what it does.

    A row an arm, means over its seed pairs.
    """
    profile, runs = load_profile(folder.name), load_runs(folder / "runs")
    found = dose(runs, pd.read_csv(folder / "tables/by_seed.csv"), profile)
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
    return "\n".join([*lines, *_notes(folder)]) + "\n"


def notebooks(folder):
    """Index of the notebooks: title, claim, executed copy in `folder`, and how long it took."""
    paths, treatment = (
        Paths(folder.name, REFERENCE),
        load_profile(folder.name).confirmatory.treatment,
    )
    place = f"{REFERENCE}/{folder.name}/notebooks"
    lines = ["| notebook | the claim that it tests | executed | took |", "|---|---|---|---|"]
    for step, name in STEPS.items():
        first = "".join(read_json(NOTEBOOKS / f"{name}.ipynb")["cells"][0]["source"])
        title, claim = re.search(r"^# (.+)", first)[1], claim_of(first)
        copies = sorted(p.name for p in (folder / "notebooks").glob(f"{name}*.ipynb"))
        shown = next((c for c in copies if f"__{treatment}-" in c), copies[0] if copies else None)
        read = f"[read]({place}/{shown})" if shown else "–"
        took = how_long(paths, step, short=True) if shown else "–"
        lines.append(f"| [{title}](notebooks/{name}.ipynb) | {claim} | {read} | {took} |")
    return "\n".join(lines) + "\n"


def speed(folder):
    """The tables of `make bench`. ValueError where none was promoted."""
    found = read_json(folder / "bench.json")
    if found is None:
        raise ValueError(f"{folder.name} has no bench.json: run make bench, then make promote")
    return speed_table(found)


BLOCKS = {
    f.__name__: f
    for f in (headline, certainty, length, cost, evidence, curve, rules, notebooks, speed)
}


def update_readme():
    """Write every generated block of the README anew; returns whether any changed."""
    text = README.read_text("utf-8")
    new = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](_reference(m[3])) + m[5], text)
    if new != text:
        atomic_write_text(README, new)
    return new != text


def _reference(name):
    """Stored results of a profile: the reference, or what there is of one."""
    for folder in (ROOT / REFERENCE / name, ROOT / PARTIAL / name):
        if (folder / "claims.json").exists():
            return folder
    raise ConfigError(f"the README shows results of {name} and none are stored: promote them first")


def _notes(folder):
    """What the stored tables say of themselves (`results.caveats`), a paragraph each."""
    table = (folder / "tables/claims.md").read_text("utf-8")
    notes = [line for line in table.splitlines() if line and not line.startswith("|")]
    return [f"\n{textwrap.fill(one, 96)}" for one in notes]


def _claims(folder):
    return {row["id"]: row for row in read_json(folder / "claims.json")}


def _sides(sides, digits, estimate=None, low=None, high=None):
    """Cells: value without, value with, difference with its interval.

    estimate: the difference, where it is not that of the sides.
    """
    without, noisy = sides
    estimate = noisy - without if estimate is None else estimate
    span = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{without:.{digits}f}", f"{noisy:.{digits}f}", f"{estimate:+.{digits}f}{span}"


def _estimate(row):
    if row["estimate"] is None:
        return row["verdict"]
    digits, span = digits_of(row["unit"]), ""
    if row["ci_low"] is not None:
        span = f" [{row['ci_low']:+.{digits}f}, {row['ci_high']:+.{digits}f}]"
    return f"{row['estimate']:+.{digits}f}{span} {row['unit']}"
