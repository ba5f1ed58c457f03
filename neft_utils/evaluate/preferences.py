"""A judge's preferences for all sets of a run's answers, where a profile asks for a judge."""

import pandas as pd

from neft_utils.base.profiles import decoding_name
from neft_utils.evaluate import alpaca_eval, endpoint, judge


def preferences(profile, answers, test, cache, say=print):
    """(DataFrame of preferences.csv, {set: summary}); (None, None) where a profile asks for none.

    answers: rows of generations.jsonl; test: the test rows, whose responses are the references;
    cache: folder of verdicts. Where the judge cannot be asked: (None, {"left_out": reason}).
    """
    settings = profile.evaluate.judge
    if settings is None or settings.model is None:
        return None, None
    usable, reason = endpoint.available(settings)
    if not usable:
        say(f"no preferences: {reason}")
        return None, {"left_out": reason}
    wanted = profile.evaluate.alpaca_eval_prompts
    known = [*test, *(alpaca_eval.rows(wanted) if wanted else ())]
    references, frames, summaries = {row["id"]: row for row in known}, [], {}
    sets = dict.fromkeys(row["set"] for row in answers)
    for name in (one for one in sets if one.startswith("test") or one == alpaca_eval.SET):
        pairs = [
            {
                "example_id": row["example_id"],
                "prompt": references[row["example_id"]]["prompt"],
                "answer": row["text"],
                "reference": references[row["example_id"]]["response"],
            }
            for row in answers
            if row["set"] == name and row["decoding"] != decoding_name(1.0)
        ]
        if pairs:
            pairs = pairs[: settings.prompts]
            found, summaries[name] = judge.judge_answers(pairs, settings, cache, say)
            frames.append(found.assign(set=name))
    return pd.concat(frames, ignore_index=True) if frames else None, summaries
