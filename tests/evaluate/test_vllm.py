"""Answers from vLLM: what is said without it, what is stored, and (NEFT_VLLM_PYTHON) itself."""

import dataclasses
import json
import os
import sys

import pandas as pd
import pytest
import torch
import yaml
from chains import copy_of_the_repository, neft
from peft import LoraConfig, get_peft_model
from tiny import Lab, silent
from transformers import LlamaConfig, LlamaForCausalLM

from neft_utils.base.paths import BASE, PROFILES, Paths
from neft_utils.base.profiles import Arm, Model
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare.runs import Engines, caveats, load_runs
from neft_utils.data.sources import read_jsonl
from neft_utils.evaluate.generate import answer, first_turn, stop_ids
from neft_utils.evaluate.vllm import engine, locate
from neft_utils.make.preflight import check
from neft_utils.train.base_models import load_tokenizer
from neft_utils.train.encoding import prompt_ids

NANO = load_profile("nano")
ASKED = {"answer_engine": "vllm"}
PROFILE = dataclasses.replace(NANO, evaluate=dataclasses.replace(NANO.evaluate, **ASKED))
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not os.environ.get(locate.VARIABLE),
        reason="NEFT_VLLM_PYTHON names no Python that has vLLM",
    ),
]


# ----------------------------------------------------------------------------- without vLLM


@pytest.fixture
def absent(monkeypatch):
    if locate.importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed beside this package")
    monkeypatch.delenv(locate.VARIABLE, raising=False)


def test_without_vllm_preflight_says_that_transformers_answers(absent):
    found = dict(check(PROFILE))["answers"]
    assert "from transformers" in found and "NEFT_VLLM_PYTHON" in found
    assert "answers" not in dict(check(NANO))


@pytest.mark.parametrize("named", ["/not/there", sys.executable])
def test_a_python_without_vllm_is_refused_before_anything_runs(absent, monkeypatch, named):
    monkeypatch.setenv(locate.VARIABLE, named)
    assert locate.vllm_python(NANO) is None  # not asked for, not looked at
    with pytest.raises(ConfigError, match=f"NEFT_VLLM_PYTHON: {named} is no Python that has vLLM"):
        check(PROFILE)


def test_to_answer_without_vllm_says_what_to_change(absent, tmp_path):
    with pytest.raises(ConfigError, match="vLLM is not installed here.*answer_engine"):
        engine.answer_all(PROFILE, Paths("nano", str(tmp_path)), silent)


def test_an_engine_that_fails_is_one_line_with_its_own_last_word(absent, tmp_path):
    log = tmp_path / "engine.log"
    with pytest.raises(RuntimeError, match=r"code 1 \(ModuleNotFoundError: .*vllm'\).*engine\.log"):
        engine._run(sys.executable, {}, log)
    assert "Traceback" in log.read_text("utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Lab with a run of each arm, the control first: answers are cut to its length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(locate.VARIABLE, raising=False)
        lab = Lab(tmp_path_factory.mktemp("vllm"), patch, evaluate=ASKED).prepare()
        for arm in ("baseline", "neft_a15"):
            lab.train(arm)
            lab.score(arm)
        yield lab


def keep(lab, arm, seed):
    """Store the answers of transformers to what vLLM would be asked, one request at a time."""
    profile, paths, kept = lab.profile, lab.paths, {}
    tokenizer, model = load_tokenizer(profile.model), lab.tuned(paths.run(arm, seed))
    for key, one in engine._requests(profile, arm, seed, paths, tokenizer).items():
        how = {k: one[k] for k in ("max_new_tokens", "repetition_penalty", "min_new_tokens")}
        prompt = tokenizer.decode(one["prompt_ids"])
        user = prompt.removeprefix("<|im_start|>user\n").rpartition("<|im_end|>")[0]
        kept[key] = answer(model, tokenizer, [user], batch_size=1, **how)[0]
    path = paths.stored_answers(arm, seed)
    path.parent.mkdir(exist_ok=True)
    weights = engine._weights(profile, arm, seed, paths)
    stored = {"engine": "vllm 0", "weights_sha256": weights, "answers": kept}
    path.write_text(json.dumps(stored), "utf-8")
    return path


@pytest.mark.parametrize("arm", ["baseline", "neft_a15"])
def test_stored_answers_take_the_place_of_generated_ones(trained, arm):
    """The rounds that are asked are those that were planned, and give the same rows."""
    run = trained.paths.run(arm, 0)
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert scores["provenance"]["answer_engine"] == "transformers"
    before = read_jsonl(run / "generations.jsonl")
    path = keep(trained, arm, 0)
    try:
        trained.score(arm)
        scores = json.loads((run / "scores.json").read_text("utf-8"))
        assert scores["provenance"]["answer_engine"] == "vllm 0"
        assert read_jsonl(run / "generations.jsonl") == before
        runs = load_runs(trained.paths.results / "runs")
        assert Engines(("transformers", "vllm 0")) in caveats(trained.profile, runs)
    finally:
        path.unlink()
        trained.score(arm)


def test_stored_answers_of_other_weights_or_prompts_are_refused(trained):
    path = keep(trained, "neft_a15", 0)
    good = json.loads(path.read_text("utf-8"))
    try:
        path.write_text(json.dumps(good | {"weights_sha256": "0"}), "utf-8")
        with pytest.raises(ConfigError, match="other weights: delete .*neft_a15-s0.json"):
            trained.score()
        good["answers"].popitem()
        path.write_text(json.dumps(good), "utf-8")
        with pytest.raises(ConfigError, match="lack a prompt: delete .*neft_a15-s0.json"):
            trained.score()
    finally:
        path.unlink()


def test_only_runs_that_answer_are_asked():
    arms = PROFILE.arms | {"neft_a5": Arm(noise_alpha=5, nll_only=True)}
    more = dataclasses.replace(PROFILE, arms=arms)
    assert more.asked_runs() == [(BASE, 0), ("baseline", 0), ("neft_a15", 0)]


# -------------------------------------------------------------------------------- with vLLM


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Folder of a random Llama whose heads are large enough for vLLM, and two adapters of it.

    Its weights are large enough that answers depend on what they follow.
    """
    folder = tmp_path_factory.mktemp("lively")
    tokenizer = load_tokenizer(Model(source="nano"))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes, **ids)
    model = LlamaForCausalLM(shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2 if "proj" in name else 1.0)
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained(folder / "model")
    for n in (1, 2):
        tuned = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        )
        tuned.save_pretrained(folder / f"adapter-{n}")
    return folder


@pytest.mark.parametrize("name", [pytest.param("float32", marks=needs_vllm)])
def test_one_engine_answers_for_every_adapter_as_transformers_does(lively, tmp_path, name):
    """Token for token in float32: penalty, its exemptions, least and most tokens, many adapters.

    In bfloat16 the two round differently, and a greedy answer goes its own way at the first tie.
    """
    from peft import PeftModel

    tokenizer = load_tokenizer(Model(source="nano"))
    prompts = [f"Say {word} again." for word in ("one", "two", "three", "four", "five", "six")]
    base = LlamaForCausalLM.from_pretrained(lively / "model", dtype=torch.float32)
    stops = stop_ids(base.generation_config, tokenizer)
    adapters = {f"adapter-{n}": str(lively / f"adapter-{n}") for n in (1, 2)}
    requests, expected = [], []
    for adapter in (None, *adapters):
        model = PeftModel.from_pretrained(base, adapters[adapter]) if adapter else base
        for penalty, least in ((1.2, 0), (1.0, 0), (1.2, 9)):
            how = {"repetition_penalty": penalty, "min_new_tokens": least, "max_new_tokens": 40}
            expected += answer(model, tokenizer, prompts, batch_size=6, **how)
            ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
            requests += [{"prompt_ids": one, "adapter": adapter} | how for one in ids]
        base = model.unload() if adapter else base
    folder = str(lively / "model")
    job = {"model": folder, "tokenizer": folder, "dtype": name, "max_model_len": 256}
    job |= {"max_num_seqs": 4, "max_lora_rank": 8, "adapters": adapters, "stops": stops}
    job |= {"exempt": sorted({*stops, tokenizer.pad_token_id}), "requests": requests}
    done = engine._run(locate.vllm_python(PROFILE), job, tmp_path / "log")
    got = [first_turn(tokenizer, tokens, stops) for tokens in done["tokens"]]
    assert (
        len({one["text"] for one in expected}) > len(expected) / 2
    )  # they differ by what is asked
    assert {one["stopped"] for one in expected} == {True, False}
    assert got == expected


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=needs_vllm) for one in ("lora", "full")]
)
def test_the_chain_takes_its_answers_from_vllm(lively, tmp_path, method):
    folder = copy_of_the_repository(tmp_path)
    values = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8"))
    values["model"] = {"source": str(lively / "model")}
    values["train"]["method"] = method
    values["model"]["base_weights"] = "bf16" if method == "full" else "nf4_dequantized"
    values["evaluate"] |= {"answer_engine": "vllm", "stability_rows": 0}
    values["evaluate"]["answer_seeds"] = values["evaluate"]["secondary_seeds"] = [0]
    profile = tmp_path / "lively.yaml"
    profile.write_text(yaml.safe_dump(values), "utf-8")
    done = neft(folder, "reproduce", "--profile", profile)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers: from vLLM, all runs in one engine" in done.stdout
    runs = load_runs(folder / "results" / "local" / "lively" / "runs")
    for (arm, seed), run in runs.items():
        asked = seed == 0
        engine = run["scores"]["provenance"]["answer_engine"]
        assert engine.startswith("vllm 0.") == asked, (arm, seed, engine)
        rows = run["generations"]
        assert len(rows) == 0 if not asked else rows.groupby("set").size()["test"] >= 4
    texts = pd.concat(runs[arm, 0]["generations"].assign(arm=arm) for arm in values["arms"])
    assert texts.text.str.len().max() > 0
    again = neft(folder, "reproduce", "--profile", profile)
    assert again.returncode == 0 and "nothing to do" in again.stdout
