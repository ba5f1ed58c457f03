"""The GPU table: its examples' lengths are Alpaca's, its rows run, and a row not run says why."""

import importlib.util
import json
import math

import pytest
import torch

from neft_utils.base.profiles import Model
from neft_utils.make.bench import examples, gpu, gpu_row
from neft_utils.train.base_models import load_tokenizer
from neft_utils.train.encoding import alpaca_prompt

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The table of the tiny shape, what was said meanwhile, and the file that it went to.

    Its time is cut in the middle, as on a rented card, and the next call measures what is missing.
    """
    said, keep = [], tmp_path_factory.mktemp("bench") / "bench-gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(gpu, "ROWS", {"ours": "", "trl": ""})
        gpu.bench_gpu("tiny", steps=3, say=said.append, keep=keep, minutes=0.001)
        patch.undo()
        patch.setenv("OMP_NUM_THREADS", "1")
        whole = gpu.measure_row

        def only_ours(kind, *how):
            assert kind != "trl", "the kill"
            return whole(kind, *how)

        patch.setattr(gpu, "measure_row", only_ours)
        with pytest.raises(AssertionError, match="the kill"):
            gpu.bench_gpu("tiny", steps=3, say=said.append, keep=keep)
        patch.setattr(gpu, "measure_row", whole)
        return gpu.bench_gpu("tiny", steps=3, say=said.append, keep=keep), said, keep


def test_the_stored_lengths_are_those_of_999_plausible_rows():
    table = examples.alpaca_lengths()
    assert list(table.columns) == ["prompt_tokens", "response_tokens", "rows"]
    assert table["rows"].sum() == 999 and (table > 0).all().all()
    assert not table.duplicated(["prompt_tokens", "response_tokens"]).any()
    assert table.prompt_tokens.min() > 30  # the template alone
    total = (table.prompt_tokens + table.response_tokens).repeat(table["rows"])
    assert 80 < total.median() < 180 and round(total.mean()) == 206
    assert round(100 * (total > examples.MAX_TOKENS).mean(), 1) == 2.5


def test_a_histogram_counts_prompts_in_their_template_and_responses_with_their_end():
    tokenizer = load_tokenizer(Model(source="nano"))  # a token is a byte
    plain = {"instruction": "Say hi.", "input": "", "output": "Hi!"}
    with_input = {"instruction": "Add.", "input": "1 2", "output": "three"}
    table = examples.length_histogram([with_input, plain, with_input], tokenizer)
    short = len(alpaca_prompt("Say hi."))
    long = len(alpaca_prompt("Add.\n\n### Input:\n1 2"))
    assert table.values.tolist() == [[short, 4, 1], [long, 6, 2]]


def test_drawn_lengths_are_reproducible_and_capped():
    drawn = examples.drawn_lengths(2000)
    assert drawn == examples.drawn_lengths(2000) != examples.drawn_lengths(2000, seed=1)
    assert max(map(sum, drawn)) == examples.MAX_TOKENS
    assert min(map(min, drawn)) >= 1
    # 2000 draws of a total with standard deviation 131 (capped): three standard errors are 9.
    assert sum(map(sum, drawn)) / 2000 == pytest.approx(204.7, abs=9)
    short = examples.drawn_lengths(50, max_tokens=20)  # below every prompt
    assert set(short) == {(19, 1)}


def test_examples_are_random_tokens_of_the_drawn_lengths():
    made = examples.random_examples(40, vocabulary=100)
    for example, (prompt, response) in zip(made, examples.drawn_lengths(40), strict=True):
        assert example["completion_mask"] == [0] * prompt + [1] * response
        assert len(example["input_ids"]) == prompt + response
    assert {i for one in made for i in one["input_ids"]} == set(range(2, 100))


def test_tokens_of_a_forward_follow_the_memory_of_the_card():
    sizes = [gpu_row.micro_batch_tokens("llama2-7b", gb * 1e9) for gb in (150, 84, 42, 25, 8)]
    assert sizes == [16384, 8192, 4096, 1024, 512]


def test_the_rows_really_run_and_give_every_key(tiny):
    found, *_ = tiny
    assert list(found["rows"]) == ["ours", "ours_small_card", "trl"]
    for kind in ("ours", "trl"):
        row = found["rows"][kind]
        real, padded = row["real_tokens_per_second"], row["padded_tokens_per_second"]
        assert 0 < real["low"] <= real["median"] <= real["high"] and row["steps"] == 2
        assert padded["low"] > real["low"]
        assert abs(row["loss"] - math.log(512)) < 0.2  # random weights know nothing of 512 words
        assert row["model_flops_utilisation"] > 0  # over 1 where a CPU has no instructions for bf16
        assert (row["peak_memory_gb"] is None) == (not CUDA)
    assert found["rows"]["ours"]["adapters"] == "float32"
    assert found["rows"]["ours"]["base_weights"] == "bf16"
    assert found["shape"] == "tiny" and found["device"] and found["versions"]["torch"]
    assert "commit" in found["rows"]["ours"] and found["ratio_vs_trl"] > 0
    assert 0 < found["rows"]["ours"]["noise_percent"] < 50 and row["noise_percent"] is None
    assert found["rows"]["ours"]["peak_bf16_gflops"] > 0
    assert found["real_tokens_per_second"] == real_median(found, "ours")
    assert found["model_flops_utilisation"] > 0
    assert {goal["reached"] for goal in found["goals"].values()} == {None}  # of the 7B shape


def test_time_cuts_the_table_between_rows_and_the_next_call_goes_on(tiny, monkeypatch):
    found, said, keep = tiny
    assert said[:2] == ["ours: skipped: no time left", "trl: skipped: no time left"]
    ours = real_median(found, "ours")
    assert f"ours: {ours:.0f} (measured before)" in said
    assert json.loads(keep.read_text("utf-8")) == found

    def none(*row):
        raise AssertionError("nothing is left to measure but what cannot run here")

    monkeypatch.setattr(gpu, "ROWS", {"ours": "", "trl": ""})
    monkeypatch.setattr(gpu, "measure_row", none)
    again = gpu.bench_gpu("tiny", steps=3, say=said.append, keep=keep)
    assert again["real_tokens_per_second"] == ours
    keep.write_text("{", "utf-8")
    with pytest.raises(ValueError, match="bench-gpu.json is not JSON .*: delete it"):
        gpu.bench_gpu("tiny", steps=3, keep=keep)


def test_a_row_that_outlasts_its_time_is_stopped_and_says_so():
    found = gpu.measure_row("ours", "tiny", 3, seconds=0.5)
    assert found == {"skipped": "stopped: not done within 0.5 s"}


def real_median(found, kind):
    return found["rows"][kind]["real_tokens_per_second"]["median"]


@pytest.mark.skipif(CUDA, reason="is about a machine without a GPU")
def test_a_row_that_needs_a_gpu_says_so_in_result_table_and_words(tiny):
    found, said, _ = tiny
    assert found["rows"]["ours_small_card"] == {"skipped": "needs a CUDA GPU"}
    assert found["small_card_peak_gb"] is None
    assert "ours_small_card: skipped: needs a CUDA GPU" in said
    text = gpu.format_table(found)
    assert "| ours_small_card | skipped: needs a CUDA GPU |" in text
    for kind in ("ours", "trl"):
        assert f"| {kind} | {real_median(found, kind):.0f} [" in text
    assert "small_card_peak_gb: None (goal: at most 12.0, not judged)" in text
    whole = gpu.bench_gpu(say=said.append)  # nothing of 7B runs on a CPU
    assert {row["skipped"] for row in whole["rows"].values()} == {"needs a CUDA GPU"}
    assert whole["real_tokens_per_second"] is whole["ratio_vs_trl"] is None


def test_goals_are_judged_for_the_large_shape(monkeypatch):
    rate = {"median": 15000.0, "low": 1.0, "high": 2e4}
    row = {"real_tokens_per_second": rate, "padded_tokens_per_second": rate, "loss": 10.9}
    row |= {"peak_memory_gb": 12.5, "model_flops_utilisation": 0.5}
    slow = row | {"real_tokens_per_second": rate | {"median": 6000.0}}
    rows = {"ours": row, "ours_small_card": row, "trl": slow}
    monkeypatch.setattr(gpu, "measure_row", lambda kind, *how: rows[kind])
    found = gpu.bench_gpu(say=lambda line: None)
    reached = {name: goal["reached"] for name, goal in found["goals"].items()}
    assert found["ratio_vs_trl"] == 2.5
    assert reached == {
        "real_tokens_per_second": True,
        "model_flops_utilisation": True,
        "ratio_vs_trl": False,
        "small_card_peak_gb": False,
    }
    text = gpu.format_table(found)
    assert "| 15000 [1, 20000] |" in text and "small_card_peak_gb: 12.5 (goal: at most" in text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    skipped = gpu.measure_row("ours", "tiny", 2)["skipped"]
    assert skipped == "not installed: pip install trl peft datasets"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "bitsandbytes" in gpu.measure_row("trl", "llama2-7b", 2)["skipped"]


def test_a_row_that_breaks_gives_the_reason_and_does_not_stop_the_table():
    assert gpu.measure_row("ours", "tiny", "two") == {
        "skipped": "failed: ValueError: invalid literal for int() with base 10: 'two'"
    }


@pytest.mark.parametrize(("shape", "steps"), [("7b", 6), ("tiny", 1)])
def test_what_cannot_be_measured_is_refused(shape, steps):
    with pytest.raises(ValueError, match="must be"):
        gpu.bench_gpu(shape, steps)


def test_the_small_card_row_trains_on_four_bits_with_checkpointing(monkeypatch):
    """On a CPU only to see that its path works: the table leaves it out there."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(gpu, "_cannot_run", lambda kind, shape: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = gpu.measure_row("ours_small_card", "tiny", 2)
    assert row["real_tokens_per_second"]["median"] > 0 and row["base_weights"] == "nf4"
    assert abs(row["loss"] - math.log(512)) < 0.2 and row["micro_batch_tokens"] == 2048


@pytest.mark.gpu
@pytest.mark.slow  # make bench-gpu, which comes next on a card, does it too
def test_a_7b_model_trains_on_a_gpu():
    row = gpu.measure_row("ours", "llama2-7b", 2)
    assert row["real_tokens_per_second"]["median"] > 0, row
    assert row["peak_memory_gb"] > 13.5  # its weights alone: 6.74 billion in two bytes
