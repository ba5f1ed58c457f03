"""A reward model from a hub on the loopback: what it gives answers, and what is refused."""

import dataclasses
import json
import math
import shutil

import pandas as pd
import pytest
import torch
from cells import run_cells
from chains import copy_of_the_repository, mine, neft
from huggingface_hub import constants
from loopback import COMMIT, hub
from tiny import Lab
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from neft_utils.base.profiles import Judge, Model, decoding_name
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import rewards as compared
from neft_utils.evaluate.preferences import preferences
from neft_utils.evaluate.reward import COLUMNS, load_reward_model, reward_of, rewards
from neft_utils.make.preflight import check
from neft_utils.train.folders import model_folder

NANO = load_profile("nano")
ASKED = {"reward_model": "owner/reward", "revision": COMMIT}
PENALISED = decoding_name(NANO.evaluate.repetition_penalty)


def classifier(folder, labels):
    """A random classifier with nano's tokenizer, whose numbers depend on all that it reads."""
    nano = model_folder(Model(source="nano"), "bf16")
    config = AutoConfig.from_pretrained(nano, num_labels=labels, initializer_range=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(Folder of owner/reward, the hub's address, paths asked for); this process talks to it."""
    top = tmp_path_factory.mktemp("rewards")
    good, two = classifier(top / "reward", 1), classifier(top / "two", 2)
    shutil.copytree(good, top / "plain")
    (top / "plain" / "chat_template.jinja").unlink()
    shutil.copytree(good, top / "cut")
    weights = top / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(good, top / "pickled")
    index = {"weight_map": {"score.weight": "pytorch_model.bin"}}
    (top / "pickled" / "model.safetensors.index.json").write_text(json.dumps(index))
    folders = {"reward": good, "checked": good, "two": two, "plain": top / "plain"}
    folders |= {"cut": top / "cut", "pickled": top / "pickled"}
    folders |= {"causal": model_folder(Model(source="nano"), "bf16")}
    named = {("models", f"owner/{name}"): folder for name, folder in folders.items()}
    with hub(named) as (address, asked), pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_CACHE", str(top / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield good, address, asked


def with_judge(**judge):
    judge = Judge(**{**ASKED, **judge})
    return dataclasses.replace(NANO, evaluate=dataclasses.replace(NANO.evaluate, judge=judge))


def by_hand(folder, prompt, answer):
    """The logit by transformers alone, from the folder that the hub serves."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(said, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids).logits[0, 0].item()


def answer(name, key, text, decoding=PENALISED):
    return {"set": name, "example_id": key, "decoding": decoding, "text": text}


TEST = [
    {"id": f"e{n}", "prompt": f"Question {n}?", "response": "Yes, it is. " * n} for n in range(3)
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card scores in bf16")
def test_a_reward_is_the_logit_of_plain_transformers(served):
    model, tokenizer = load_reward_model(Judge(**ASKED))
    found = [reward_of(model, tokenizer, "Why?", text) for text in ("Because.", "So.", "")]
    wanted = [by_hand(served[0], "Why?", text) for text in ("Because.", "So.", "")]
    assert found == pytest.approx(wanted, abs=1e-4)
    assert min(abs(a - b) for a, b in zip(found, found[1:], strict=False)) > 0.01  # unlike texts
    assert any("model.safetensors" in path for path in served[2])
    # As many tokens as the model reads, and one more.
    room = model.config.max_position_embeddings
    spent = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}])["input_ids"])
    spent += len(tokenizer.apply_chat_template([{"role": "assistant", "content": ""}])["input_ids"])
    assert math.isfinite(reward_of(model, tokenizer, "", "x" * (room - spent)))
    assert math.isnan(reward_of(model, tokenizer, "", "x" * (room - spent + 1)))


def test_answers_to_test_prompts_are_scored_beside_their_references(served):
    rows = [
        *(answer("test", row["id"], f"Answer {row['id']} is long.") for row in TEST),
        answer("shown", "shown-0", "not scored"),
        answer("test", "e0", "without penalty, not scored", decoding_name(1.0)),
        answer("verifiable", "v0", "not scored"),
        answer("test_cut", "e1", "Answer"),
    ]
    said, profile = [], with_judge(prompts=2)
    table = rewards(profile, rows, TEST, said.append)
    assert list(table.columns) == COLUMNS
    names = list(zip(table["set"], table.example_id, strict=True))
    assert names == [("test", "e0"), ("test", "e1"), ("test_cut", "e1")]
    assert table.n_words.tolist() == [4, 4, 1] and table.reference_words.tolist() == [0, 3, 3]
    (model, tokenizer), third = load_reward_model(profile.evaluate.judge), table.iloc[2]
    assert third.reward == reward_of(model, tokenizer, "Question 1?", "Answer")
    assert third.reference_reward == reward_of(model, tokenizer, "Question 1?", "Yes, it is. ")
    (line,) = said
    assert line.startswith("reward model owner/reward: ") and line.endswith("(logits)")
    assert preferences(profile, rows, TEST, None) == (None, None)  # that judge has no endpoint
    assert rewards(NANO, rows, TEST) is None
    nothing = with_judge(reward_model="owner/none")  # is not even looked for
    assert rewards(nothing, [answer("shown", "shown-0", "not scored")], TEST) is None


@pytest.mark.parametrize(
    "judge, words",
    [
        ({"reward_model": "owner/causal"}, "is no reward model (score.weight is not in its files)"),
        ({"reward_model": "owner/two"}, "gives 2 numbers, a reward is one"),
        ({"reward_model": "owner/plain"}, "has no chat template to read an answer by"),
        ({"reward_model": "owner/cut"}, "owner/cut cannot be loaded (SafetensorError: "),
        ({"reward_model": "owner/pickled"}, "names 'pytorch_model.bin': only *.safetensors"),
        ({"revision": "f" * 40}, "evaluate.judge.revision: owner/reward has no commit ffff"),
        ({"revision": None}, "evaluate.judge.revision: pin a commit of owner/reward"),
        ({"reward_model": "owner/none"}, "evaluate.judge.reward_model: the hub has no owner/none"),
        ({"reward_model": "./here"}, "evaluate.judge.reward_model: ./here is neither a folder"),
    ],
)
def test_what_cannot_score_is_refused_in_a_line(served, judge, words):
    with pytest.raises(ConfigError) as caught:
        load_reward_model(Judge(**{**ASKED, **judge}))
    said = str(caught.value)
    assert words in said and "\n" not in said and said.startswith("evaluate.judge.re")


@pytest.mark.parametrize("judge", [{}, {**ASKED, "model": "some-judge"}, {"revision": COMMIT}])
def test_a_judge_is_an_endpoints_model_or_a_reward_model(judge, tmp_path):
    path = mine(tmp_path, evaluate={"judge": judge})
    with pytest.raises(ConfigError, match=r"evaluate\.judge: needs either model, which .* or rewa"):
        load_profile(path)
    assert load_profile(mine(tmp_path, evaluate={"judge": ASKED})).evaluate.judge == Judge(**ASKED)


def test_the_check_names_the_reward_model_and_whether_it_is_here(served):
    def said(**judge):
        return dict(check(with_judge(**judge), here=False))["judge"]

    name = {"reward_model": "owner/checked"}
    assert said(**name) == "owner/checked, to be downloaded from the hub"
    load_reward_model(Judge(**{**ASKED, **name}))
    assert said(**name) == "owner/checked, in the cache"
    with pytest.raises(ConfigError, match="evaluate.judge.revision: pin a commit of owner/checked"):
        said(**name, revision="main")


LIGHT = {"answer_prompts_without_penalty": 0, "verifiable_per_family": 0, "stability_rows": 0}
LIGHT |= {"train_answer_prompts": 0, "length_arm_prompts": 0, "max_new_tokens": 8}
BOTH = {"answer_prompts": 4, "answer_seeds": [0, 1]}
FAST = [
    ("simulation.coverage_table(2000)", "simulation.coverage_table(20)"),
    ("assert rates.interval.between(0.93, 0.98).all()", "assert len(rates)"),
]


def test_notebooks_3_to_5_score_compare_and_show(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    lab = Lab(tmp_path, monkeypatch, evaluate={**LIGHT, "judge": ASKED}, seeds=[0]).prepare()
    for arm, seed in lab.profile.runs():
        lab.train(arm, seed)
        lab.score(arm, seed)
    assert capsys.readouterr().out.count("reward model owner/reward: ") == 2
    scored = {run: pd.read_csv(lab.paths.run(*run) / "rewards.csv") for run in lab.profile.runs()}
    assert all(len(one) == 4 and one.reward.notna().all() for one in scored.values())
    names = run_cells(5, PROFILE=str(lab.file), OUT=lab.paths.out, edits=FAST)
    table = names["rewarded"].set_index("view")
    delta = scored["neft_a15", 0].reward - scored["baseline", 0].reward
    assert table.estimate["difference"] == pytest.approx(delta.mean())
    apart = scored["baseline", 0].reference_reward - scored["baseline", 0].reward
    assert table.estimate["reference"] == pytest.approx(apart.mean()) and abs(apart.mean()) > 0.1
    said = capsys.readouterr().out
    assert "neft_a15: one seed pair, so no interval: the reward model's score is" in said
    written = pd.read_csv(lab.paths.tables / "rewards.csv")
    assert written.view.tolist() == list(compared.VIEWS)
    assert written.estimate.to_numpy() == pytest.approx(table.estimate.to_numpy(), nan_ok=True)
    main = pd.read_csv(lab.paths.tables / "main.csv").set_index("arm")
    assert main.reward["baseline"] == pytest.approx(scored["baseline", 0].reward.mean())
    assert "alpaca_eval_reward" not in main
    ledger = json.loads((lab.paths.results / "claims.json").read_text("utf-8"))
    judged = next(row for row in ledger if row["id"] == "better_answers")
    assert judged["estimate"] is None  # nobody preferred anything


@pytest.mark.slow
def test_the_whole_chain_with_a_reward_model(served, tmp_path):
    folder = copy_of_the_repository(tmp_path / "clone")
    profile = mine(tmp_path, evaluate={**LIGHT, **BOTH, "judge": ASKED})
    surroundings = {"HF_ENDPOINT": served[1], "HF_HOME": str(tmp_path / "home")}
    surroundings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = neft(folder, "reproduce", "--profile", profile, **surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
    results = folder / "results" / "local" / "mine"
    tables = sorted(results.glob("runs/*/rewards.csv"))
    assert len(tables) == 5 and all(len(pd.read_csv(path)) == 4 for path in tables)
    assert pd.read_csv(results / "tables" / "rewards.csv").view.tolist() == list(compared.VIEWS)
    assert "| `reward`, logits |" in (results / "tables" / "main.md").read_text("utf-8")
    again = neft(folder, "check", "--profile", profile, **surroundings)
    assert "owner/reward, in the cache" in again.stdout
