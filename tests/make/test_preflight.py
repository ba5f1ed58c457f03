"""What is refused before anything starts, and what is only said."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
from tiny import Lab

from neft_utils.base import pins, provenance
from neft_utils.base.profiles import Judge
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.make import plan, preflight
from neft_utils.make.preflight import check, memory_gb

NANO = load_profile("nano")
GPU = dataclasses.replace(NANO, device="cuda", gpu_memory_gb=20.0)
SMI = "#!/bin/sh\necho 'NVIDIA A10G, {mib}'\n"


def card(folder, monkeypatch, mib):
    """An nvidia-smi that lists one card, first on the path."""
    tool = folder / "nvidia-smi"
    tool.write_text(SMI.format(mib=mib))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_machine_that_will_do_is_described(tmp_path, monkeypatch):
    found = dict(check(NANO))
    assert found["packages"] == "as pinned" and found["device"].startswith("CPU, ")
    assert "free" in found["disk"] and found["model"] == "nano" and "judge" not in found
    card(tmp_path, monkeypatch, 24576)
    assert dict(check(GPU))["device"] == "NVIDIA A10G, 26 GB"


def test_runs_go_side_by_side_on_a_card_as_asked_and_as_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_gb", lambda: 16.0)
    small = dataclasses.replace(GPU, gpu_memory_gb=6.0, memory_gb=2.0)
    assert plan.workers(small, 5) == 5  # `make plan` for another machine
    card(tmp_path, monkeypatch, 24576)
    assert [plan.workers(small, cores) for cores in (1, 2, 9)] == [1, 2, 4]
    monkeypatch.setattr(preflight, "cores", lambda: 3)
    assert plan.workers(small) == 3 and plan.workers(GPU) == 1  # a large model fills a card
    monkeypatch.setattr(preflight, "cores", lambda: 64)
    roomy = dataclasses.replace(small, memory_gb=0.5, gpu_memory_gb=1.0)
    assert plan.workers(small) == 4 and plan.workers(roomy) == 9
    assert plan.workers(dataclasses.replace(small, memory_gb=7.0), 9) == 2
    assert plan.workers(dataclasses.replace(small, gpu_memory_gb=0.0), 9) == 1
    assert plan.workers(dataclasses.replace(NANO, memory_gb=20.0), 9) == 1


def test_the_machine_is_looked_at_without_loading_anything():
    """Notebook 00 waits for it, and torch alone takes seconds to import."""
    code = "import sys; from neft_utils.make.commands import main; main(sys.argv[1:]);"
    code += " print({'torch', 'pandas', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "check", "--machine", "--profile", "nano"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *found, loaded = lines
    assert [line.partition(":")[0] for line in found] == [what for what, _ in check(NANO)]
    assert loaded == "set()"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="has a GPU")
def test_no_gpu_is_refused_before_and_at_training(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs a GPU and none is here: use PROFILE=cpu"):
        check(GPU)
    check(GPU, here=False)  # a cluster's nodes may have what the head has not
    lab = Lab(tmp_path, monkeypatch, device="cuda").prepare()
    for run in (lab.train, lab.score):
        with pytest.raises(ConfigError, match="torch sees none"):
            run("baseline")


def test_too_little_gpu_memory_memory_and_disk(tmp_path, monkeypatch):
    card(tmp_path, monkeypatch, 8192)
    with pytest.raises(ConfigError, match="needs 20 GB of GPU memory, NVIDIA A10G has 9: lower"):
        check(GPU)
    with pytest.raises(ConfigError, match="needs 100000 GB of memory a run.*lower"):
        check(dataclasses.replace(NANO, memory_gb=1e5))
    with pytest.raises(ConfigError, match="GB more of disk, free are .*free some space"):
        check(dataclasses.replace(NANO, disk_gb=1e6))


def test_packages_that_are_missing_or_other_versions(tmp_path, monkeypatch):
    own = tmp_path / "requirements.txt"
    own.write_text("torch==1.0.0  # old\nno-such-package==2.0  # missing\n")
    monkeypatch.setattr(pins, "PINS", own)
    with pytest.raises(ConfigError) as caught:
        check(NANO)
    assert "not 1.0.0; no-such-package is missing, not 2.0: run make env" in str(caught.value)


def test_a_judge_without_its_key_is_said_not_refused(monkeypatch):
    judge = Judge(model="some-judge", key_variable="SOME_KEY", max_usd=2.0)
    judged = dataclasses.replace(NANO, evaluate=dataclasses.replace(NANO.evaluate, judge=judge))
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert dict(check(judged))["judge"] == "SOME_KEY is not set: preferences will be left out"
    monkeypatch.setenv("SOME_KEY", "canary-1234")
    said = str(check(judged))
    assert "at most 2 USD" in said and "canary" not in said


def test_prompts_beyond_the_rows_that_there_are_are_said_before_training():
    assert "prompts" not in dict(check(NANO))

    def said(**asked):
        more = dataclasses.replace(NANO.evaluate, **asked)
        arms = {**NANO.arms, "few": dataclasses.replace(NANO.arms["baseline"], data_fraction=0.25)}
        return dict(check(dataclasses.replace(NANO, evaluate=more, arms=arms))).get("prompts", "")

    # 12 test rows; 16 training rows, of which one arm gets a quarter
    assert said(answer_prompts=12, train_answer_prompts=4, train_rows=4) == ""
    for name in ("answer_prompts", "answer_prompts_without_penalty", "stability_rows"):
        assert (
            said(**{name: 13})
            == f"evaluate.{name} asks for 13, there are 12 test rows: 12 are taken"
        )
    both = said(length_arm_prompts=99, train_answer_prompts=5)
    assert "length_arm_prompts asks for 99, there are 12 test rows: 12" in both
    assert "train_answer_prompts asks for 5, there are 4 training rows: 4" in both
    assert "train_rows asks for 5, there are 4 training rows" in said(train_rows=5)
    assert "there are 805 prompts of AlpacaEval" in said(alpaca_eval_prompts=806)
    judge = Judge(model="some-judge", prompts=5)
    assert (
        said(judge=judge) == "evaluate.judge.prompts asks for 5, there are 4 answers: 4 are taken"
    )
    assert said(judge=dataclasses.replace(judge, prompts=4)) == ""


def test_what_is_downloaded_or_made_of_it_is_listed_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert preflight.kept() == {}
    for name, size in (("models/mine", 3_000_000), ("wheels/one.whl", 1_000_000)):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("models"):
            (tmp_path / "data" / name).mkdir()
            name += "/weights"
        (tmp_path / "data" / name).write_bytes(b"0" * size)
    assert preflight.kept() == {"data/models/mine": 0.003, "data/wheels/one.whl": 0.001}


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    whole = memory_gb()
    limit = tmp_path / "memory.max"
    limit.write_text("1000000000\n")
    monkeypatch.setattr(preflight, "LIMIT", limit)
    assert memory_gb() == 1.0 < whole
    limit.write_text("max\n")
    assert memory_gb() == whole


def test_models_that_are_not_here_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def model(**changes):
        return dataclasses.replace(NANO, model=dataclasses.replace(NANO.model, **changes))

    away = model(source="owner/some-model", revision="0" * 40)
    assert dict(check(away))["model"] == "owner/some-model, to be downloaded from the hub"
    with pytest.raises(ConfigError, match="pin a commit of owner/some-model"):
        check(model(source="owner/some-model"))
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        check(model(source="./not/there"))
    assert dict(check(model(source=str(tmp_path))))["model"] == str(tmp_path)


@pytest.mark.parametrize(
    "text, slow",
    [
        ("flags\t\t: fpu sse avx2 f16c\n", True),
        ("flags\t\t: fpu avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("processor\t: 0\n", False),  # nothing is said
    ],
)
def test_a_processor_without_bf16_is_known(tmp_path, text, slow):
    (tmp_path / "cpuinfo").write_text(text, "utf-8")
    assert provenance.without_bf16(tmp_path / "cpuinfo") is slow
    assert not provenance.without_bf16(tmp_path / "not there")
