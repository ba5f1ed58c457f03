"""Other people's answers: the submission to the public leaderboard that NEFTune's authors made.

805 answers of `alpaca-7b-neft` with GPT-4's preferences against text_davinci_003 are downloaded
when they are wanted, at one commit and by sha256 (`facts/alpaca_eval_files.csv`), and so are those
of `alpaca-7b`. Their texts are CC BY-NC 4.0: they stay in data/downloads, and results hold numbers
only.

`python -m neft_utils.compare.published CONTROL_DIR TREATMENT_DIR` compares any two such folders.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd

from neft_utils.base.files import write_csv, write_json
from neft_utils.base.paths import REFERENCE, Paths
from neft_utils.base.wheels import NoNetworkError
from neft_utils.compare import length_control, length_pairs
from neft_utils.compare.expected import EVIDENCE
from neft_utils.compare.facts import leaderboard_pair, leaderboard_rows, paper_results
from neft_utils.compare.published_views import views
from neft_utils.evaluate import text_metrics
from neft_utils.evaluate.alpaca_eval import COMMIT, CONTROL, TREATMENT, prompt_id, submission

CHUNK = 50  # words; the paper's C for Alpaca (Table 4)
LIMITS = ("mean", "low", "high")
NAMES = ("model_outputs.json", "annotations.json")


def read_arm(folder):
    """A folder's answers as `length_pairs` wants them: prompt_id, preference, chars,
    reference_chars; one row per instruction that was answered and annotated.

    annotations.json: output_1 is the reference, output_2 the candidate; preference 1..2 is 1 plus
    the share of the win (0 and 1.5 are draws), null is missing. model_outputs.json: the candidate.
    prompt_id is a hash of the instruction. Raises ValueError of one line, naming file and remedy.
    """
    folder = Path(folder)
    answers = _rows(folder / "model_outputs.json", ("instruction", "output"))
    judged = _rows(folder / "annotations.json", ("instruction", "output_1"))
    texts = {row["instruction"]: row["output"] for row in answers}
    rows = []
    for row in judged:
        text = texts.get(row["instruction"])
        if text is None:
            continue
        if row.get("output_2", text) != text:
            remedy = "swap the two" if row["output_1"] == text else "annotate these outputs again"
            where = f"{folder / 'annotations.json'}: row {judged.index(row)}"
            raise ValueError(f"{where}: output_2 is not the answer in model_outputs.json: {remedy}")
        win = _win(row.get("preference"), folder)
        rows.append([prompt_id(row["instruction"]), win, len(text), len(row["output_1"])])
    if not rows:
        raise ValueError(f"{folder}: no instruction is in both model_outputs.json and annotations")
    return pd.DataFrame(rows, columns=length_pairs.COLUMNS)


def _rows(path, fields):
    """A JSON list of objects whose `fields` are strings, each instruction once."""
    try:
        rows = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a folder needs {' and '.join(NAMES)}") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{path} cannot be read as JSON ({reason}): copy it again") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must be a list of objects with at least one in it")
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{path}: row {number} has no text {field!r}")
    if len({row["instruction"] for row in rows}) < len(rows):
        raise ValueError(f"{path}: an instruction is there twice: keep one row for each")
    return rows


def _win(preference, folder):
    if preference is None or preference != preference:
        return math.nan
    if isinstance(preference, int | float) and not isinstance(preference, bool):
        if preference == 0:
            return 0.5
        if 1 <= preference <= 2:
            return preference - 1.0
    raise ValueError(
        f"{folder / 'annotations.json'}: preference {preference!r} is not 1 to 2, 0 (draw) or null"
    )


def compare(control_dir, treatment_dir, n_resamples=2000, seed=0):
    """Every view of length on two folders, treatment minus control, as plain JSON.

    Percentage points and characters: raw_difference, raw_ci, length_controlled {form: [estimate,
    low, high]}, length_matched {tolerance: [estimate, se, n]}, mean_chars [control, treatment] and
    n, n_missing, win_rates, equal_length_win_rates and slopes {form: [control, treatment]},
    share_explained {form: [share, low, high]}, n_failed {form: resamples}, length_only_judges
    {the judge's form: {view: [mean, low, high]}}, overlap, fit, quintiles (lists of rows),
    same_reference (false: the reference answers differ in length, so the raw gain may be theirs).
    What cannot be estimated is null. Raises ValueError as `read_arm` and `pair_arms` do.
    """
    arms = read_arm(control_dir), read_arm(treatment_dir)
    pairs = length_pairs.pair_arms(*arms)
    raw = length_pairs.raw_difference(pairs)
    forms = length_control.length_controlled(pairs, n_resamples, seed).set_index("form")
    matched = length_pairs.length_matched(pairs).set_index("tolerance")
    references = [pairs[f"reference_chars_{arm}"] for arm in length_pairs.ARMS]
    out = {
        "n": len(pairs),
        "n_missing": len(set(arms[0].prompt_id) | set(arms[1].prompt_id)) - len(pairs),
        "win_rates": [raw["control"], raw["treatment"]],
        "raw_difference": raw["estimate"],
        "raw_ci": [raw["ci_low"], raw["ci_high"]],
        "length_controlled": _lists(forms, "estimate", "ci_low", "ci_high"),
        "equal_length_win_rates": _lists(forms, "control", "treatment"),
        "share_explained": _lists(forms, "share_explained", "share_low", "share_high"),
        "slopes": _lists(forms, "slope_control", "slope_treatment"),
        "length_only_judges": {
            form: _lists(length_control.length_only_judge(pairs, form).set_index("view"), *LIMITS)
            for form in ("pooled_tanh", "pooled_log_ratio")
        },
        "n_failed": forms["n_failed"].to_dict(),
        "length_matched": _lists(matched, "estimate", "se", "n"),
        "mean_chars": [float(pairs[f"chars_{arm}"].mean()) for arm in length_pairs.ARMS],
        "overlap": length_pairs.overlap(pairs),
        "same_reference": references[0].equals(references[1]),
        "fit": length_control.compare_forms(pairs).to_dict("records"),
        "quintiles": length_pairs.by_length_change(pairs).to_dict("records"),
    }
    return _plain(out)


def _lists(frame, *columns):
    return frame[list(columns)].astype(object).T.to_dict("list")


def _plain(value):
    """NumPy to Python, not finite to None: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_statistics(folders):
    """Length, repetition and diversity of public answers beside the paper's Table 4.

    folders: {name: folder with model_outputs.json}, the control first, then the treatment. Columns
    arm, chars, words (means per answer), two_gram_repetition (percent), log_diversity (the paper's
    variant), log_diversity_textbook, n_chunks (answers of at least CHUNK words); the last two rows
    are the paper's LLaMA-2-7B on Alpaca without and with noise.
    """
    rows = []
    for name, folder in folders.items():
        answers = _rows(Path(folder) / "model_outputs.json", ("instruction", "output"))
        texts = [row["output"] for row in answers]
        words = [text.split() for text in texts]
        first = [" ".join(some[:CHUNK]) for some in words if len(some) >= CHUNK]
        means = [sum(map(len, items)) / len(items) for items in (texts, words)]
        repetition, n_chunks = text_metrics.two_gram_repetition(texts, CHUNK)
        both = [text_metrics.log_diversity(first, variant) for variant in ("paper", "textbook")]
        rows.append([name, *means, repetition, *both, n_chunks])
    names = "arm chars words two_gram_repetition log_diversity log_diversity_textbook n_chunks"
    ours = pd.DataFrame(rows, columns=names.split())
    return pd.concat([ours, _table_4()], ignore_index=True).astype({"n_chunks": "Int64"})


def _table_4():
    table = paper_results().query("table == '4' and train_data == 'Alpaca' and model != '-'")
    wide = table.pivot(index="noise", columns="metric", values="value").loc[["none", "uniform"]]
    columns = {
        "response_chars": "chars",
        "response_words": "words",
        "repetition_2gram_pct": "two_gram_repetition",
    }
    arms = [f"paper, noise {noise}" for noise in wide.index]
    return wide.rename(columns=columns).reset_index(drop=True).assign(arm=arms)


def revisit(paths, say=print, cache=None):
    """What the public answers say, written to <paths.results>/published/ and returned.

    paths: base.paths.Paths. Returns source, pair (leaderboard_pair()), comparison (compare(...))
    and the DataFrames leaderboard, views, matched, quintiles, fit, text_statistics, and writes
    comparison.json and a CSV of each table: numbers, no texts. source is "annotations"; without
    cache and network it is "stored" if this folder or a reference holds the numbers of the same
    files, else "leaderboard" (comparison None, views has printed numbers only, no further tables);
    one line says so. Raises ProvenanceError for a file that is there but is not the pinned one.
    """
    folder, pair = paths.results / "published", leaderboard_pair()
    source, found, tables = "annotations", None, {"leaderboard": leaderboard_rows()}
    try:
        folders = {name: submission(name, cache) for name in (CONTROL, TREATMENT)}
        found = {"commit": COMMIT, **compare(*folders.values())}
        tables["text_statistics"] = text_statistics(folders)
    except NoNetworkError as error:
        known = (Paths(name, REFERENCE).results / "published" for name in EVIDENCE)
        found, tables["text_statistics"] = _stored(folder, *known)
        source = "leaderboard" if found is None else "stored"
        what = {"leaderboard": "leaderboard rows only", "stored": "numbers of an earlier run"}
        say(f"{what[source]}: {error}")
    tables["views"] = views(found, pair)
    if found is None:
        del tables["text_statistics"]
    else:
        rows = [[float(key), *values] for key, values in found["length_matched"].items()]
        tables["matched"] = pd.DataFrame(rows, columns=["tolerance", "estimate", "se", "n"])
        tables |= {name: pd.DataFrame(found[name]) for name in ("quintiles", "fit")}
        write_json(folder / "comparison.json", found)
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    return {"source": source, "pair": pair, "comparison": found, **tables}


def _stored(*folders):
    """The first earlier comparison of these files, and its text statistics; else (None, None)."""
    for folder in folders:
        try:
            found = json.loads((folder / "comparison.json").read_text("utf-8"))
            texts = pd.read_csv(folder / "text_statistics.csv").astype({"n_chunks": "Int64"})
        except (OSError, ValueError, KeyError):
            continue
        if found.get("commit") == COMMIT:
            return found, texts
    return None, None


def main(argv=None):
    """Compare two folders and print JSON; exit code 2 and one line for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m neft_utils.compare.published", description=compare.__doc__
    )
    parser.add_argument("control_dir", help="folder with model_outputs.json and annotations.json")
    parser.add_argument("treatment_dir", help="the same for the other arm")
    arguments = parser.parse_args(argv)
    try:
        found = compare(arguments.control_dir, arguments.treatment_dir)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
