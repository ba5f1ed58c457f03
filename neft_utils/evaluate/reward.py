"""A reward model's scores of answers: a judge that runs here and needs no key.

A sequence classifier with one label reads a prompt with an answer and gives a number (Skywork's
Reward-V2 series, for one). Its unit is its own and says nothing by itself: differences between two
runs' answers to the same prompts do, beside how often the longer of the two got more, since such
models favour length. It is no win rate: nobody judged.
"""

import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification

from neft_utils.base import hub
from neft_utils.base.strict import ConfigError, one_line
from neft_utils.evaluate import asking
from neft_utils.train.base_models import open_tokenizer
from neft_utils.train.folders import check_files, device_map

KEY = "evaluate.judge.reward_model"
COLUMNS = ["set", "example_id", "reward", "reference_reward", "n_words", "reference_words"]


def rewards(profile, answers, test, say=print):
    """DataFrame of rewards.csv, a row an answer; None without a reward model or answers.

    answers: rows of generations.jsonl; test: the test rows, whose responses are the references.
    A reward is a logit; NaN where prompt and answer are longer than the model reads.
    """
    settings = profile.evaluate.judge
    if settings is None or settings.reward_model is None:
        return None
    sets = asking.for_a_judge(profile, answers, test)
    if not sets:
        return None
    model, tokenizer = load_reward_model(settings)
    rows = []
    for name, pairs in sets.items():
        for pair in pairs:
            texts = pair["answer"], pair["reference"]
            scores = [reward_of(model, tokenizer, pair["prompt"], text) for text in texts]
            words = [len(text.split()) for text in texts]
            rows.append((name, pair["example_id"], *scores, *words))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    means = frame[["reward", "reference_reward"]].mean()
    say(
        f"reward model {settings.reward_model}: {means.reward:.3f} on average over {len(frame)}"
        f" answers, {means.reference_reward:.3f} over their references (logits)"
    )
    return frame


def load_reward_model(settings):
    """(model in eval mode, tokenizer) of a profiles.Judge; ConfigError for what cannot score."""
    folder = hub.snapshot(settings.reward_model, settings.revision, KEY)
    check_files(folder, "bf16", KEY)
    where = f"{KEY}: {settings.reward_model}"
    tokenizer = open_tokenizer(
        folder,
        f"{where} has no tokenizer that can be read ({{reason}}): name a whole model",
        f"{where}: its tokenizer has no eos_token: name another model",
    )
    if not tokenizer.chat_template:
        raise ConfigError(f"{where} has no chat template to read an answer by: name another")
    # A CPU scores in float32: the differences between answers are small.
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    options = {"dtype": dtype, "use_safetensors": True, **device_map()}
    with one_line(f"{where} cannot be loaded ({{reason}}): name another model"):
        model, about = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, **options
        )
    if about["missing_keys"]:
        name = sorted(about["missing_keys"])[0]
        raise ConfigError(f"{where} is no reward model ({name} is not in its files): name another")
    if model.config.num_labels != 1:
        raise ConfigError(f"{where} gives {model.config.num_labels} numbers, a reward is one")
    return model.eval(), tokenizer


@torch.no_grad()
def reward_of(model, tokenizer, prompt, answer):
    """The logit that a reward model gives an answer to a prompt, both strings; NaN if too long."""
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        return float("nan")
    return float(model(ids.to(model.device)).logits[0, 0])
