"""`compare_models` and its command, on small random models against plain transformers."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft_utils import compare_models
from neft_utils.base.profiles import Model
from neft_utils.base.strict import ConfigError
from neft_utils.compare import stats, two_models
from neft_utils.compare.__main__ import main
from neft_utils.data.sources import own_rows
from neft_utils.train import folders
from neft_utils.train.base_models import load_base, load_tokenizer

ROWS = own_rows()[:84:4]
SIZE = 64  # hidden size of the nano model


def plain_losses(folder, rows, adapter=None):
    """(content sum, content tokens, end) of each row by plain transformers, a row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if adapter is not None:
        model.load_adapter(str(adapter))
    out = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
        nll = -logits.log_softmax(1)[torch.arange(len(answer)), answer]
        out.append((float(nll[:-1].sum()), len(answer) - 1, float(nll[-1])))
    return np.array(out).T


def save(model, folder):
    model.save_pretrained(folder)
    load_tokenizer(Model(source="nano")).save_pretrained(folder)
    return folder


def untied(folder):
    """The nano model in float32 with a head of its own, so that a row of it can change alone."""
    model = load_base(Model(source="nano"), "bf16").float()
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    return save(model, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folders of a model and of the same one with a less probable end of turn."""
    root = tmp_path_factory.mktemp("two")
    control = untied(root / "control")
    model = AutoModelForCausalLM.from_pretrained(control, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(control)
    with torch.no_grad():
        texts = [tokenizer(row["response"], return_tensors="pt") for row in ROWS]
        states = [model.model(**text).last_hidden_state[0, -1] for text in texts]
        usual = torch.stack(states).mean(0)
        model.lm_head.weight[tokenizer.eos_token_id] -= usual / usual.norm() ** 2
    return control, save(model, root / "later")


@pytest.fixture(scope="module")
def adapters(two):
    """Folders of four LoRA adapters on the control: two without a change, two with a larger one."""
    root, out = two[0].parent, []
    for name, size in (("plain-0", 0.01), ("noisy-0", 0.05), ("plain-1", 0.01), ("noisy-1", 0.05)):
        base = AutoModelForCausalLM.from_pretrained(two[0], dtype="auto")
        torch.manual_seed(len(out))
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=size)
        model.save_pretrained(root / name)
        out.append(root / name)
    return out


def measured(found, name):
    return found.measures.set_index("measure").loc[name]


def test_a_model_that_is_later_to_stop_is_found_to_be(two, capsys):
    found = compare_models(*two, ROWS)
    (content, count, end), (content_b, _, end_b) = (plain_losses(one, ROWS) for one in two)
    n = len(ROWS)
    later = measured(found, "end_nll")
    assert later.estimate == pytest.approx(np.mean(end_b - end), abs=1e-5)
    half = 2.085963447 * np.std(end_b - end, ddof=1) / math.sqrt(n)  # t, 20 degrees of freedom
    assert later.ci_high - later.estimate == pytest.approx(half, rel=1e-3)
    assert later.ci_low > 0.5 and later.n_pairs == 1 and later.n_rows == n == 21
    assert later.sentence.startswith("Stopping: later to stop, the end of turn is less likely by ")
    same = measured(found, "content_nll")
    assert same.estimate == pytest.approx((content_b - content).sum() / count.sum(), abs=1e-5)
    assert abs(same.estimate) < 0.01 * later.estimate
    whole = measured(found, "test_nll")
    total = (content_b + end_b - content - end).sum() / (count + 1).sum()
    assert whole.estimate == pytest.approx(total, abs=1e-5)
    assert "say nothing about another seed" in str(found)
    assert len(found.answers) == 0 and "answer_length" not in list(found.measures.measure)


def test_the_other_way_round_has_the_other_sign(two):
    there, back = compare_models(*two, ROWS), compare_models(*two[::-1], ROWS)
    assert np.allclose(there.measures.estimate, -back.measures.estimate, atol=1e-7)
    assert measured(back, "end_nll").sentence.startswith("Stopping: sooner to stop, ")


def test_the_same_model_twice_differs_in_nothing(two):
    found = compare_models(two[0], two[0], ROWS, answers=2, max_new_tokens=3)
    assert (found.measures.estimate == 0).all() and found.measures.ci_low.isna().all()
    assert found.measures.sentence.str.contains(": no difference at all").all()


def test_pairs_of_adapters_have_an_interval_over_pairs_and_rows(two, adapters):
    found = compare_models(adapters[::2], adapters[1::2], ROWS)
    parts = {one: plain_losses(two[0], ROWS, one) for one in adapters}
    deltas = []
    for seed, (plain, noisy) in enumerate(zip(adapters[::2], adapters[1::2], strict=True)):
        difference = parts[noisy][2] - parts[plain][2]
        ids = [row["id"] for row in ROWS]
        deltas.append(pd.DataFrame({"seed": seed, "example_id": ids, "delta": difference}))
    expected = stats.confirmatory_interval(pd.concat(deltas))
    row = measured(found, "end_nll")
    assert row.estimate == pytest.approx(expected.estimate, abs=1e-5)
    assert (row.ci_low, row.ci_high) == pytest.approx(
        (expected.ci_low, expected.ci_high), rel=1e-3, abs=1e-5
    )
    tokens = np.tile(parts[adapters[0]][1], 2)
    content = [
        (parts[b][0] - parts[a][0]) / parts[a][1]
        for a, b in zip(adapters[::2], adapters[1::2], strict=True)
    ]
    weighted = np.average(np.concatenate(content), weights=tokens)
    assert measured(found, "content_nll").estimate == pytest.approx(weighted, abs=1e-5)
    assert row.n_pairs == 2 and "over 2 pairs of models and 21 rows" in str(found)
    thin = [line for line in found.figure().axes[0].lines if line.get_linewidth() < 1]
    assert len(thin) == 2


def test_an_adapters_base_may_be_rounded_as_qlora_has_it(two, adapters, tmp_path, monkeypatch):
    """One way is the rounded base's own folder, the other a flag; neither is the plain base."""
    monkeypatch.setattr(folders, "MODELS", tmp_path)  # where rounded weights are kept
    model = load_base(Model(source=str(two[0]), base_weights="nf4_dequantized"))
    rounded = save(model, two[0].parent / "rounded")
    flag = compare_models(*adapters[:2], ROWS, nf4=True)
    folder = compare_models(*adapters[:2], ROWS, base=rounded)
    plain = compare_models(*adapters[:2], ROWS)
    assert np.allclose(flag.rows.test_nll, folder.rows.test_nll, atol=1e-6)
    assert not np.allclose(flag.rows.test_nll, plain.rows.test_nll, atol=1e-4)


def test_answers_are_compared_prompt_by_prompt_as_a_ratio(two):
    """Stops of the random model do not come, so its answers are as long as they may be."""
    said = []
    found = compare_models(*two, ROWS[:3], answers=5, max_new_tokens=4, say=said.append)
    assert found.answers[["control", "treatment"]].eq(4).all(axis=None)
    assert found.answers.cut.all() and "3 of 3 pairs of answers were cut" in str(found)
    assert "3 of 5 prompts are there to be answered" in said
    control = [{"n_tokens": n, "stopped": True} for n in (1, 10, 20)]  # the first: an empty one
    treatment = [{"n_tokens": n, "stopped": True} for n in (2, 10, 30)]
    lengths = two_models._lengths(control, treatment, ROWS).assign(seed=0)
    found = two_models._comparison(found.rows, lengths)
    longer = 100 * (math.exp((math.log(2) + math.log(1.5)) / 3) - 1)
    row = measured(found, "answer_length")
    assert row.estimate == pytest.approx(longer) and row.ci_low < row.estimate < row.ci_high


def test_rows_that_are_too_long_are_left_out_and_counted(two):
    said = []
    rows = [*ROWS[:4], {"id": "long", "prompt": "x" * 2000, "response": "y"}]
    found = compare_models(*two, rows, say=said.append)
    assert set(found.rows.example_id) == {row["id"] for row in ROWS[:4]}
    assert said == ["1 of 5 rows are over 1024 tokens and left out"]


def test_one_row_has_no_interval(two):
    found = compare_models(*two, ROWS[:1])
    assert found.measures.ci_low.isna().all() and (found.measures.estimate != 0).all()
    assert found.measures.sentence.str.contains("without a spread for an interval").all()


class TestCommand:
    def run(self, capsys, *arguments):
        status = main([str(one) for one in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    @pytest.fixture
    def rows(self, tmp_path):
        path = tmp_path / "rows.json"
        alpaca = [{"instruction": r["prompt"], "output": r["response"]} for r in ROWS]
        path.write_text(json.dumps([*alpaca, {"instruction": "a", "output": ""}]), "utf-8")
        return path

    def test_it_says_its_sentences_and_writes_tables_and_figure(
        self, two, adapters, rows, tmp_path, capsys
    ):
        out = tmp_path / "made" / "here"
        more = ["--pair", *adapters[2:], "--answers", 2, "--max-new-tokens", 3]
        status, said, wrong = self.run(
            capsys, *adapters[:2], *more, "--rows", rows, "--base", two[0], "--out", out
        )
        assert status == 0 and wrong == ""
        measures = pd.read_csv(out / "measures.csv")
        names = ["end_nll", "content_nll", "test_nll", "answer_length"]
        assert measures.measure.tolist() == names and (measures.n_pairs == 2).all()
        assert said.splitlines()[:4] == measures.sentence.tolist()
        table = pd.read_csv(out / "rows.csv")
        assert len(table) == 2 * len(ROWS)  # the row without an answer is left out
        assert table.end_nll.mean() == pytest.approx(measures.estimate[0])
        assert len(pd.read_csv(out / "answers.csv")) == 4
        assert set(pd.read_csv(out / "by_length.csv").measure) >= {"p_end", "content_nll"}
        assert (out / "end_of_turn.png").stat().st_size > 10_000
        assert "<svg" in (out / "end_of_turn.svg").read_text("utf-8")

    def refused(self, capsys, *arguments):
        status, said, wrong = self.run(capsys, *arguments)
        assert status == 1 and said == ""
        (line,) = wrong.strip().splitlines()
        assert line.startswith("error: ") and "model.source" not in line
        return line

    def test_models_that_are_not_there(self, two, rows, capsys, tmp_path):
        line = self.refused(capsys, two[0], "no/such", "--rows", rows)
        assert "no/such: there is no such folder; of the hub give owner/name@COMMIT" in line
        line = self.refused(capsys, "owner/name@abc", two[0], "--rows", rows)
        assert "owner/name@abc: pin a commit of owner/name on the hub, 40 hex digits" in line
        line = self.refused(capsys, tmp_path, two[0], "--rows", rows)
        assert f"error: {tmp_path} holds no model (no config.json)" in line

    def test_an_adapter_without_its_base(self, two, adapters, rows, capsys, tmp_path):
        def lost(name):
            folder = tmp_path / "lost"
            shutil.copytree(adapters[0], folder, dirs_exist_ok=True)
            config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            config["base_model_name_or_path"] = name
            (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
            return folder

        line = self.refused(capsys, lost("/gone"), adapters[1], "--rows", rows)
        assert "lost: an adapter without its base (/gone: there is no such folder" in line
        assert "by base (--base)" in line
        line = self.refused(capsys, lost(None), adapters[1], "--rows", rows)
        assert "names no base: name it by base (--base)" in line
        line = self.refused(capsys, lost(str(adapters[0])), adapters[1], "--rows", rows)
        assert "is an adapter itself" in line
        status, said, _ = self.run(
            capsys, lost("/gone"), adapters[1], "--rows", rows, "--base", two[0]
        )
        assert status == 0 and "Intervals: 95 %, over 21 rows alone." in said

    def test_an_adapter_of_another_model(self, adapters, rows, capsys, tmp_path):
        other = load_base(Model(source="nano"), "bf16")
        model = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "other")
        config = json.loads((tmp_path / "other" / "adapter_config.json").read_text("utf-8"))
        config["target_modules"] = ["down_proj"]  # weights for these are not in the file
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        line = self.refused(capsys, adapters[0], tmp_path / "other", "--rows", rows)
        assert "other: its adapter does not fit onto its base" in line
        (tmp_path / "other" / "adapter_model.safetensors").unlink()
        line = self.refused(capsys, adapters[0], tmp_path / "other", "--rows", rows)
        assert "no adapter_model.safetensors: save the adapter again" in line

    def test_models_that_read_rows_differently(self, two, rows, capsys, tmp_path):
        shutil.copytree(two[1], tmp_path / "b")
        tokenizer = AutoTokenizer.from_pretrained(two[1])
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper")
        tokenizer.save_pretrained(tmp_path / "b")
        line = self.refused(capsys, two[0], tmp_path / "b", "--rows", rows)
        assert "have different tokenizers or chat templates (row row-000001 becomes other" in line

    def test_a_model_whose_training_went_wrong(self, two, rows, capsys, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(two[1], dtype="auto")
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        line = self.refused(capsys, two[0], save(model, tmp_path / "nan"), "--rows", rows)
        assert "losses that are no numbers" in line

    @pytest.mark.parametrize(
        "content, words",
        [
            ([{"prompt": "a", "response": " "}], "rows.json: none of 1 rows has both a prompt and"),
            ([], "holds no rows"),
            ([{"question": "a"}], "has columns question; wanted:"),
            ([{"prompt": "x" * 3000, "response": "b"}], "rows: all 1 are longer than the 1024 tok"),
            (None, "rows: there is no file"),
        ],
    )
    def test_rows_without_anything_usable(self, two, tmp_path, capsys, content, words):
        path = tmp_path / "rows.json"
        if content is not None:
            path.write_text(json.dumps(content), "utf-8")
        assert words in self.refused(capsys, *two, "--rows", path)

    def test_help_says_what_it_is_for(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and "better, or later to stop?" in said
        for option in ("--pair", "--rows", "--base", "--nf4", "--answers", "--out"):
            assert option in said


@pytest.mark.parametrize(
    "control, treatment, rows, words",
    [
        (["a", "b"], ["c"], ROWS, "2 controls and 1 treatments: give as many of each"),
        ([], [], ROWS, "0 controls and 0 treatments"),
        ("nano", "nano", [{"prompt": "a"}], "row 1 lacks a prompt or a response"),
        ("nano", "nano", [dict(ROWS[0]), dict(ROWS[0])], "two rows have the same id"),
    ],
)
def test_what_is_given_wrongly_is_one_line(control, treatment, rows, words):
    with pytest.raises(ConfigError, match=words):
        compare_models(control, treatment, rows)
