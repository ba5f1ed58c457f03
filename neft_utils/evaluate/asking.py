"""What a run's model is asked to answer, and its answers as the rows of generations.jsonl."""

from typing import NamedTuple

from neft_utils.base.paths import BASE
from neft_utils.base.profiles import decoding_name
from neft_utils.data import sources
from neft_utils.evaluate import alpaca_eval, verifiable

# The paper's Table 5 makes an ordinary model talk: by asking for it, and by forbidding the end
# of the answer before 250 new tokens.
LONG_PROMPT = "\n\nPlease give a long and comprehensive answer."
MIN_NEW_TOKENS = 250


class Round(NamedTuple):
    """Prompts that are answered together, {set name: {id: prompt}}, and how."""

    sets: dict
    repetition_penalty: float
    min_new_tokens: int = 0

    def prompts(self):
        """[(set name, id, prompt)]"""
        return [(name, *one) for name, prompts in self.sets.items() for one in prompts.items()]

    def how(self, settings):
        """How they are answered: what `generate.answer` and its like take besides the prompts."""
        return {
            "max_new_tokens": settings.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": min(self.min_new_tokens, settings.max_new_tokens),
        }


def test_rounds(profile, arm, test):
    """Test prompts, with the penalty and, for a few, without; the paper's Table 5 where asked."""
    settings = profile.evaluate
    penalty = settings.repetition_penalty
    prompts = {row["id"]: row["prompt"] for row in test}
    shown = {f"shown-{n}": prompt for n, prompt in enumerate(settings.shown_prompts)}
    yield Round({"test": _first(prompts, settings.answer_prompts), "shown": shown}, penalty)
    yield Round({"test": _first(prompts, settings.answer_prompts_without_penalty)}, 1.0)
    if settings.alpaca_eval_prompts:
        asked = alpaca_eval.rows(settings.alpaca_eval_prompts)
        yield Round({alpaca_eval.SET: {row["id"]: row["prompt"] for row in asked}}, penalty)
    if settings.length_arm_prompts and arm != BASE and arm == profile.control_of(arm):
        some = _first(prompts, settings.length_arm_prompts)
        yield Round({"test_long_prompt": {k: v + LONG_PROMPT for k, v in some.items()}}, penalty)
        yield Round({"test_min_tokens": some}, penalty, MIN_NEW_TOKENS)


def secondary_round(profile, train, composed):
    """Some of the run's own training prompts, and the verifiable instructions."""
    settings = profile.evaluate
    prompts = _first({row["id"]: row["prompt"] for row in train}, settings.train_answer_prompts)
    instructions = {one["item_id"]: one["prompt"] for one in composed}
    return Round({"train": prompts, "verifiable": instructions}, settings.repetition_penalty)


def compose(profile, test):
    """The verifiable instructions of a profile, empty where none are asked for."""
    count = profile.evaluate.verifiable_per_family
    return verifiable.compose(test, count) if count else []


def for_a_judge(profile, answers, test):
    """{set name: [{"example_id", "prompt", "answer", "reference"}]}, what a judge shall read.

    answers: rows of generations.jsonl; test: the test rows, whose responses are the references.
    Of a set the first `judge.prompts` answers, decoded as the profile says.
    """
    settings = profile.evaluate
    wanted, usual = settings.alpaca_eval_prompts, decoding_name(settings.repetition_penalty)
    known = [*test, *(alpaca_eval.rows(wanted) if wanted else ())]
    known, sets = {row["id"]: row for row in known}, {}
    for row in answers:
        name, key = row["set"], row["example_id"]
        judged = name.startswith("test") or name == alpaca_eval.SET
        if not judged or row["decoding"] != usual:
            continue
        some = sets.setdefault(name, [])
        if len(some) < settings.judge.prompts:
            prompt, reference = known[key]["prompt"], known[key]["response"]
            pair = {"prompt": prompt, "answer": row["text"], "reference": reference}
            some.append({"example_id": key, **pair})
    return sets


class Answers:
    """Collects the rows of generations.jsonl: answers to rounds of prompts.

    answer: a function from prompts and `Round.how` to [{"n_tokens", "stopped", "text"}].
    """

    def __init__(self, answer, tokenizer, settings, say):
        self.answer, self.tokenizer, self.settings, self.say = answer, tokenizer, settings, say
        self.rows = []

    def ask(self, round):
        """Have a Round answered. Returns {id: answer text}."""
        asked = round.prompts()
        if not asked:
            return {}
        answers = self.answer([prompt for _, _, prompt in asked], **round.how(self.settings))
        decoding = decoding_name(round.repetition_penalty)
        tokens = sum(one["n_tokens"] for one in answers)
        names = ", ".join(round.sets)
        self.say(f"{names}, {decoding}: {tokens} tokens in {len(answers)} answers")
        self.rows += [
            {"set": name, "example_id": key, "decoding": decoding, **one}
            for (name, key, _), one in zip(asked, answers, strict=True)
        ]
        return {key: one["text"] for (_, key, _), one in zip(asked, answers, strict=True)}

    def cut(self, name, to):
        """Test answers cut to as many tokens as another run's; to: that run's folder."""
        limits = {
            row["example_id"]: row["n_tokens"]
            for row in sources.read_jsonl(to / "generations.jsonl")
            if row["set"] == "test"
        }
        usual = decoding_name(self.settings.repetition_penalty)
        for row in [row for row in self.rows if row["set"] == "test"]:
            limit = limits.get(row["example_id"])
            if limit is None or row["decoding"] != usual:
                continue
            ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"][:limit]
            short = {"text": self.tokenizer.decode(ids), "n_tokens": min(row["n_tokens"], limit)}
            stopped = row["stopped"] and row["n_tokens"] <= limit
            self.rows.append({**row, "set": name, **short, "stopped": stopped})


def _first(prompts, count):
    return dict(list(prompts.items())[:count])
