"""`make plan` of the 7B profiles: speeds that `make bench-gpu` measured in place of estimates."""

import dataclasses

import pytest

from neft_utils.base import estimate
from neft_utils.base.files import read_json, write_json
from neft_utils.base.paths import Paths
from neft_utils.base.read_profile import load_profile
from neft_utils.make.plan import show_plan
from neft_utils.make.promotion import keep_gpu_bench

QLORA = load_profile("llama2-7b-alpaca-qlora")
ROW = {
    "real_tokens_per_second": {"median": 4600.0, "low": 4500.0, "high": 4700.0},
    "base_weights": "nf4",
    "gradient_checkpointing": True,
    "commit": "c0ffee",
    "dirty": False,
}


def bench(path, **rows):
    """A file of `make bench-gpu` with these rows; a row: changes of ROW."""
    rows = {name: ROW | row for name, row in rows.items()}
    write_json(path, {"shape": "llama2-7b", "device": "NVIDIA H200", "rows": rows})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "ROOT", tmp_path)
    return tmp_path


def training_seconds(profile, paths):
    """(seconds of all steps, tokens), without notebooks' starts and losses on the way."""
    rows = {
        name: (tokens, seconds) for name, _, tokens, seconds in estimate.estimate(profile, paths)
    }
    tokens, seconds = rows["fine-tune"]
    length = tokens / sum(
        profile.data.train_rows * profile.recipe(arm).epochs for arm, _ in profile.runs()
    )
    scored = sum(estimate.scored_on_the_way(profile, arm) for arm, _ in profile.runs())
    starts = len(profile.runs()) * profile.speed.notebook_start
    return seconds - starts - length * scored / profile.speed.forward, tokens


def test_a_plan_takes_the_measured_speed_and_says_so(place, capsys):
    paths = Paths(QLORA.name)
    before, tokens = training_seconds(QLORA, paths)
    assert before == pytest.approx(tokens / QLORA.speed.train)
    show_plan(QLORA, paths, 1)
    assert "(speeds estimated, not measured)" in capsys.readouterr().out
    bench(place / "results/local/bench-gpu.json", ours={"base_weights": "bf16"}, ours_small_card={})
    after, _ = training_seconds(QLORA, paths)
    assert after == pytest.approx(tokens / 4600)
    show_plan(QLORA, paths, 1)
    said = capsys.readouterr().out
    assert "training measured by make bench-gpu on NVIDIA H200, the others estimated" in said


def test_only_what_the_bench_measured_is_called_measured(place):
    bench(place / "results/local/bench-gpu.json", ours_small_card={})

    def found(name):
        profile = load_profile(name)
        return estimate.measured_training(profile, Paths(profile.name))

    assert found("llama2-7b-evol-qlora") == (4600.0, "NVIDIA H200")
    assert found("llama2-7b-alpaca-full") is None  # trains every weight
    assert found("mistral-7b-alpaca-qlora") is None  # of another shape
    assert found("gpu-small") is found("cpu") is None
    plain = dataclasses.replace(QLORA.train, gradient_checkpointing=False)
    other = dataclasses.replace(QLORA, train=plain)
    assert estimate.measured_training(other, Paths(other.name)) is None


def test_a_row_that_was_not_measured_gives_no_speed_and_promoted_ones_come_second(place):
    write_json(
        place / "results/local/bench-gpu.json",
        {"shape": "llama2-7b", "device": "A", "rows": {"ours_small_card": {"skipped": "no time"}}},
    )
    assert estimate.measured_training(QLORA, Paths(QLORA.name)) is None
    bench(place / "results/reference/bench-gpu.json", ours_small_card={})
    assert estimate.measured_training(QLORA, Paths(QLORA.name)) == (4600.0, "NVIDIA H200")


def test_the_bench_is_kept_from_clean_commits_and_never_for_less(tmp_path):
    here, kept = tmp_path / "local.json", tmp_path / "reference" / "bench-gpu.json"
    keep_gpu_bench(here, kept)  # nothing was measured
    bench(here, ours={"dirty": True})
    keep_gpu_bench(here, kept)
    assert not kept.exists()
    bench(here, ours={}, trl={})
    keep_gpu_bench(here, kept)
    assert len(read_json(kept)["rows"]) == 2
    bench(here, ours={})
    keep_gpu_bench(here, kept)
    assert len(read_json(kept)["rows"]) == 2
