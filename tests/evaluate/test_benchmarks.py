"""Scores of benchmarks that a plain forward pass agrees with, and what moves them."""

import copy
import json
import os
import random
import subprocess
import sys

import pandas as pd
import pytest
import torch
from tiny import lively_nano, silent

from neft_utils.base.files import ROOT
from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.evaluate import benchmarks
from neft_utils.evaluate.benchmark_items import candidates, question
from neft_utils.noise import noisy_embeddings
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.encoding import prompt_ids
from neft_utils.train.fast import ATTENTION
from neft_utils.train.folders import MODELS

NANO = Model(source="nano")
DEFAULT = load_profile("cpu").model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def lively():
    return lively_nano()


@pytest.fixture(scope="module")
def default():
    """(model, tokenizer) of the default profiles."""
    if not list(MODELS.glob(f"{DEFAULT.source}-*{DEFAULT.base_weights}")):
        pytest.skip("the base model is not converted yet: run notebook 01 or 03 once")
    return load_base(DEFAULT), load_tokenizer(DEFAULT)


@torch.no_grad()
def plain_logprob(model, tokenizer, prompt, reply):
    """Log-probability in nats of `reply` after "Answer:" in the chat: one sequence, one forward."""
    begin = prompt_ids(tokenizer, prompt)
    begin += tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    ids = begin + tokenizer(f" {reply}", add_special_tokens=False)["input_ids"]
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(begin), len(ids)))


def expected_rows(model, tokenizer, name, rows):
    """What `score` shall return for a task."""
    out = []
    for row in rows:
        texts = candidates(row)
        found = [plain_logprob(model, tokenizer, question(row), text) for text in texts]
        values = [found[0], None, None, None]
        if len(texts) > 1:
            each = [value / len(text) for value, text in zip(found, texts, strict=True)]
            scores = found
            if "choices" in row:
                ids = tokenizer([f" {text}" for text in texts], add_special_tokens=False)
                counts = map(len, ids["input_ids"])
                scores = [value / count for value, count in zip(found, counts, strict=True)]
            best = float(max(scores) == scores[0]), float(max(each) == each[0])
            values = [found[0], *best, scores[0] - max(scores[1:])]
        out.append((name, row["id"], *values))
    columns = ["task", "item_id", "gold_logprob", "correct", "correct_norm", "margin"]
    return pd.DataFrame(out, columns=columns).astype(dict.fromkeys(columns[2:], float))


@pytest.mark.wheels
def test_scores_equal_those_of_a_plain_forward_pass(tasks, lively, tokenizer):
    names = ["siqa", "openbookqa", "asdiv"]
    found = benchmarks.score(lively, tokenizer, names, 6, say=silent)
    assert list(found.columns) == benchmarks.COLUMNS
    expected = [expected_rows(lively, tokenizer, name, tasks[name][:6]) for name in names]
    expected = pd.concat(expected, ignore_index=True)[benchmarks.COLUMNS]
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=2e-3)
    assert set(found.correct) == {0.0, 1.0} == set(found.correct_norm)
    assert found.correct.equals((found.margin > 0).astype(float))
    # The two ways of choosing differ somewhere, so one is not taken for the other.
    assert (found.correct != found.correct_norm).any()


@pytest.mark.wheels
def test_the_default_model_agrees_with_a_plain_forward_pass(tasks, default):
    found = benchmarks.score(*default, ["openbookqa"], 3, say=silent)
    expected = expected_rows(*default, "openbookqa", tasks["openbookqa"][:3])
    # bf16 rounds differently in rows of another shape.
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), abs=0.5)


@pytest.mark.wheels
def test_a_text_without_wrong_answers_has_a_log_probability_alone(tasks, default):
    found = benchmarks.score(*default, ["mtbench"], 1, say=silent)
    assert found.gold_logprob[0] < 0 and found[["correct", "margin"]].isna().all(axis=None)


HELP = "The answer is {}. "
STYLES = {
    "another lead": {"LEAD": "A:"},
    "a space behind the question": {"after": " "},
    "friendliness asked for": {"before": "Please answer in a kind and friendly way. "},
}


def mean_scores(monkeypatch, default, name, rows, before="", after="", **changes):
    """(margin, accuracy, log-probability of the right answers): means over changed items."""
    asked = [
        {**row, "prompt": before.format(candidates(row)[0].rstrip(".")) + question(row) + after}
        for row in rows
    ]
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "items", lambda *args: asked)
        for key, value in changes.items():
            patch.setattr(benchmarks, key, value)
        found = benchmarks.score(*default, [name], len(rows), say=silent)
    return found.margin.mean(), found.correct.mean(), found.gold_logprob.mean()


@pytest.mark.wheels
@pytest.mark.parametrize("name", ["asdiv", "openbookqa"])
def test_help_moves_the_margin_and_style_does_not(tasks, default, monkeypatch, name):
    """Helped, the model reads the right answer in the prompt; style moves an eighth at most."""
    rows = tasks[name][:8]
    plain = mean_scores(monkeypatch, default, name, rows)
    helped = mean_scores(monkeypatch, default, name, rows, before=HELP)
    gain = helped[0] - plain[0]
    assert gain > 2 and helped[1] >= 0.75 > 0.25 + plain[1] / 2
    for style, changes in STYLES.items():
        found = mean_scores(monkeypatch, default, name, rows, **changes)
        assert abs(found[0] - plain[0]) < gain / 8, (style, found, plain)


# ------------------------------------------------------------------------------- the model


@pytest.mark.wheels
def test_two_calls_give_identical_numbers_and_leave_everything_as_it_was(tasks, tokenizer):
    model = load_base(NANO).train()
    env, python, rng = dict(os.environ), random.getstate(), torch.get_rng_state()
    first = benchmarks.score(model, tokenizer, ["openbookqa"], 5, say=silent)
    assert not model.training
    second = benchmarks.score(model, tokenizer, ["openbookqa"], 5, say=silent)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert dict(os.environ) == env
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), rng)
    assert model.config._attn_implementation == ATTENTION
    assert tokenizer.padding_side == load_tokenizer(NANO).padding_side


@pytest.mark.wheels
def test_noise_that_ends_with_training_is_silent_and_other_noise_is_refused(tasks, tokenizer):
    model = load_base(NANO)
    clean = benchmarks.score(model, tokenizer, ["asdiv"], 5, say=silent)
    with pytest.warns(UserWarning), noisy_embeddings(model.train(), noise_alpha=50.0):
        noisy = benchmarks.score(model, tokenizer, ["asdiv"], 5, say=silent)
    pd.testing.assert_frame_equal(clean, noisy, check_exact=True)

    def always(module, inputs, output):
        return output + torch.rand_like(output)

    handle = model.get_input_embeddings().register_forward_hook(always)
    with pytest.raises(ValueError, match="embeddings differ from call to call in eval mode"):
        benchmarks.score(model, tokenizer, ["asdiv"], 5, say=silent)
    handle.remove()


@pytest.mark.wheels
def test_an_adapter_counts_and_its_dropout_does_not(tasks, lively, tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    tuned = get_peft_model(copy.deepcopy(lively), config).train()
    found = benchmarks.score(tuned, tokenizer, ["openbookqa"], 3, say=silent)
    expected = expected_rows(tuned, tokenizer, "openbookqa", tasks["openbookqa"][:3])
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), rel=1e-5)
    base = benchmarks.score(lively, tokenizer, ["openbookqa"], 3, say=silent)
    assert (abs(found.gold_logprob - base.gold_logprob) > 0.01).all()
    assert tuned.config._attn_implementation == ATTENTION


ALONE = """
import os, socket

def refuse(*args, **kwargs):
    print("network:", args)
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = refuse
from neft_utils.base.quiet import quiet_libraries
quiet_libraries()
from neft_utils.evaluate import benchmarks
from neft_utils.train import base_models as model
from neft_utils.base.profiles import Model
nano = Model(source="nano", base_weights="bf16")
base, tokenizer, before = model.load_base(nano), model.load_tokenizer(nano), dict(os.environ)
benchmarks.score(base, tokenizer, ["siqa", "asdiv"], 2, generate=True)
print(dict(os.environ) == before)
"""


@pytest.mark.wheels
def test_scoring_asks_no_network_prints_its_own_lines_only_and_keeps_the_environment(tasks, built):
    command = [sys.executable, "-W", "default::UserWarning", "-c", ALONE]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"NEFT_HOME": str(built[0])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    siqa, asdiv, answers, unchanged = done.stdout.splitlines()
    assert siqa.startswith("siqa: mean correct ") and siqa.endswith(" over 2 items")
    assert asdiv.startswith("asdiv: mean correct ") and asdiv.endswith(" over 2 items")
    assert answers.startswith("asdiv_answers: mean correct ")
    assert unchanged == "True"


@pytest.mark.wheels
def test_the_last_number_of_a_greedy_answer_decides(tasks, tokenizer, monkeypatch):
    """A model in which every byte has one successor says "9, 42.0" to every question."""
    successor = torch.zeros(len(tokenizer), dtype=torch.long)
    begin = prompt_ids(tokenizer, "?")[-1]
    ids = [begin, *tokenizer("9,\t42.0")["input_ids"], tokenizer.eos_token_id]
    successor[ids[:-1]] = torch.tensor(ids[1:])
    model = load_base(NANO)

    def speak(module, args, kwargs, output):
        seen = kwargs["input_ids"][:, -output.logits.shape[1] :]
        output.logits = 9.0 * torch.nn.functional.one_hot(successor[seen], len(tokenizer))
        return output

    model.register_forward_hook(speak, with_kwargs=True)
    numbers = ["42", "9", "42.0", "420", "4"]
    rows = [
        {"id": f"asdiv-{i}", "prompt": f"{'a' * i}?", "gold": f" {n}", "answer": n}
        for i, n in enumerate(numbers)
    ]
    found = benchmarks._answered(model, tokenizer, "asdiv", rows, 3, silent)
    assert found.correct.tolist() == [1, 0, 1, 0, 0]
    assert found.item_id.tolist() == [row["id"] for row in rows]
    assert set(found.task) == {"asdiv_answers"}


# ------------------------------------------------------------------------ what is said, refused


@pytest.mark.wheels
def test_fewer_items_than_asked_for_are_said_in_one_line(tasks, lively, tokenizer):
    said = []
    found = benchmarks.score(lively, tokenizer, ["openbookqa"], 501, say=said.append)
    assert len(found) == 500
    line = "openbookqa: 501 items are asked for, the benchmark has 500: all are scored"
    assert said[0] == line and len(said) == 2
    said.clear()
    benchmarks.score(lively, tokenizer, ["openbookqa"], 3, say=said.append)
    assert len(said) == 1


@pytest.mark.wheels
def test_an_item_longer_than_the_model_reads_is_named(tasks, tokenizer):
    message = r"mtbench item mtbench-\d+ takes \d+ tokens and the model reads 1024: leave mtbench"
    with pytest.raises(ValueError, match=message):
        benchmarks.score(load_base(NANO), tokenizer, ["mtbench"], say=silent)


@pytest.mark.parametrize(
    "names, batch_size, message",
    [
        ("siqa", 1, "names must be a list of different benchmarks, got 'siqa'"),
        ([], 1, "names must be a list of different benchmarks"),
        (["siqa", "siqa"], 1, "names must be a list of different benchmarks"),
        (["siqa"], 0, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_score_are_one_line(names, batch_size, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.score(None, None, names, batch_size=batch_size)


# ---------------------------------------------------------------------- tasks as lm-eval has them

OWN_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
{target}
metric_list: [{{metric: {measure}, aggregation: mean, higher_is_better: true}}]
"""


def test_leaderboard_tasks_are_scored_item_by_item(lively, tokenizer, tmp_path, monkeypatch):
    rows = [
        {"prompt": f"What is {n} plus one?", "choices": [str(n), str(n + 1)], "label": n % 2}
        for n in range(6)
    ]
    file = tmp_path / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    kinds = {
        "own_choice": (
            "multiple_choice",
            "doc_to_choice: choices\ndoc_to_target: label",
            "acc_norm",
        ),
        "own_answer": (
            "generate_until",
            'doc_to_target: "{{choices[label]}}"\n'
            'generation_kwargs: {until: ["?"], max_gen_toks: 4}',
            "exact_match",
        ),
    }
    for name, (kind, target, measure) in kinds.items():
        text = OWN_TASK.format(name=name, file=file, kind=kind, target=target, measure=measure)
        (tmp_path / f"{name}.yaml").write_text(text)
    own = {name: (0, measure) for name, (_, _, measure) in kinds.items()}
    monkeypatch.setattr(benchmarks, "LEADERBOARD", own)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    said = []
    frame = benchmarks.score_leaderboard(
        lively, tokenizer, list(own), 5, say=said.append, include_path=str(tmp_path)
    )
    assert frame.columns.tolist() == benchmarks.COLUMNS and len(said) == 2
    choice, answer = (frame[frame.task == name] for name in own)
    assert len(choice) == len(answer) == 5 and frame.item_id.is_unique
    assert set(choice.correct) <= {0.0, 1.0} and (choice.gold_logprob < 0).all()
    assert set(answer.correct) <= {0.0, 1.0} and answer.gold_logprob.isna().all()
    # The right option's log-probability, by a plain forward pass.
    context = tokenizer(rows[0]["prompt"], add_special_tokens=False)["input_ids"]
    target = tokenizer(" " + rows[0]["choices"][0], add_special_tokens=False)["input_ids"]
    lively.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = lively(torch.tensor([context + target])).logits[0].log_softmax(-1)
    plain = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(target))
    assert choice.gold_logprob.iloc[0] == pytest.approx(plain, rel=1e-4)


OFFLINE = """
from neft_utils.evaluate import benchmarks
from neft_utils.train import base_models as m
from neft_utils.base.profiles import Model
nano = Model(source="nano")
benchmarks.score_leaderboard(m.load_base(nano), m.load_tokenizer(nano), ["arc_challenge"], 2)
"""


def test_a_leaderboard_task_that_cannot_be_had_is_one_line(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1 and "DataError: leaderboard task arc_challenge cannot be had" in last
    )
    assert "leave it out of evaluate.leaderboard" in last
