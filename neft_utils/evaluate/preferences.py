"""A judge's preferences for all sets of a run's answers, where a profile asks for a judge."""

import pandas as pd

from neft_utils.evaluate import asking, endpoint, judge


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
    frames, summaries = [], {}
    for name, pairs in asking.for_a_judge(profile, answers, test).items():
        found, summaries[name] = judge.judge_answers(pairs, settings, cache, say)
        frames.append(found.assign(set=name))
    return pd.concat(frames, ignore_index=True) if frames else None, summaries
