"""Answers of all runs at once from vLLM: one engine holds the base and every run's adapter.

vLLM pins its own torch and transformers, so it may live in an environment of its own, which
NEFT_VLLM_PYTHON names; `vllm_worker` is what runs there. Answers are stored by weights and
request, and notebook 04 takes them from there instead of generating.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from neft_utils.base import files
from neft_utils.base.files import read_json, sha256_file, write_json
from neft_utils.base.paths import BASE
from neft_utils.base.strict import ConfigError
from neft_utils.data import splits
from neft_utils.data.splits import train_rows
from neft_utils.evaluate import asking
from neft_utils.evaluate.generate import first_turn, stop_ids
from neft_utils.evaluate.vllm.locate import VARIABLE, WORKER, vllm_python
from neft_utils.train.base_models import load_tokenizer, require_device
from neft_utils.train.encoding import prompt_ids
from neft_utils.train.folders import model_folder, weights_file

# What vLLM's kernels are made for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def answer_all(profile, paths, say=print):
    """Answer every prompt of every trained run, and store the answers.

    Runs with adapters share one engine; fully fine-tuned models get one each. Raises ConfigError
    without vLLM, RuntimeError of one line where it fails.
    """
    require_device(profile)
    executable = vllm_python(profile)
    if executable is None:
        raise ConfigError(
            f"vLLM is not installed here: name a Python that has it in {VARIABLE}, or set"
            " evaluate.answer_engine: transformers"
        )
    tokenizer = load_tokenizer(profile.model)
    groups = {}
    for arm, seed in profile.asked_runs():
        run = paths.run(arm, seed)
        whole = arm != BASE and profile.train.method == "full"
        groups.setdefault(run / "model" if whole else _base(profile), []).append((arm, seed))
    for folder, members in groups.items():
        requests = {one: _requests(profile, *one, paths, tokenizer) for one in members}
        job = _job(profile, folder, tokenizer, requests, paths)
        log = paths.stored_answers(*members[0]).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        answered = iter((done := _run(executable, job, log))["tokens"])
        for (arm, seed), asked in requests.items():
            turns = {key: first_turn(tokenizer, next(answered), job["stops"]) for key in asked}
            stored = {
                "engine": f"vllm {done['version']}",
                "weights_sha256": _weights(profile, arm, seed, paths),
                "answers": turns,
            }
            write_json(paths.stored_answers(arm, seed), stored)
            tokens = sum(one["n_tokens"] for one in turns.values())
            say(f"{arm}-s{seed}: {tokens} tokens in {len(turns)} answers")
        log.unlink()


def stored(profile, arm, seed, paths):
    """(engine, function like `generate.answer`) of a run's stored answers; None without any.

    Raises ConfigError for answers of other weights, or to other prompts.
    """
    path = paths.stored_answers(arm, seed)
    kept = read_json(path) if profile.evaluate.answer_engine == "vllm" else None
    if kept is None:
        return None
    again = f"delete {os.path.relpath(path, files.ROOT)} and run make reproduce again"
    if kept["weights_sha256"] != _weights(profile, arm, seed, paths):
        raise ConfigError(f"stored answers of {arm}-s{seed} are of other weights: {again}")

    def answer(prompts, **how):
        keys = [_key(prompt, how) for prompt in prompts]
        if any(key not in kept["answers"] for key in keys):
            raise ConfigError(f"stored answers of {arm}-s{seed} lack a prompt: {again}")
        return [kept["answers"][key] for key in keys]

    return kept["engine"], answer


def _base(profile):
    """The base's folder: vLLM gets NF4 weights dequantised, which are the same numbers."""
    held = profile.model.base_weights
    return model_folder(profile.model, "nf4_dequantized" if held == "nf4" else held)


def _weights(profile, arm, seed, paths):
    """sha256 of what was trained; of the base weights for the base."""
    trained = paths.run(arm, seed) / profile.weights
    return sha256_file(weights_file(profile.model) if arm == BASE else trained)


def _requests(profile, arm, seed, paths, tokenizer):
    """{key: one request of the job} of everything that a run is asked."""
    test, rounds = splits.load_split(paths.processed, "test"), []
    if profile.answers(arm, seed):
        rounds += asking.test_rounds(profile, arm, test)
    if profile.secondary(arm, seed):
        train = train_rows(profile, arm, profile.all_seeds()[0] if arm == BASE else seed, paths)
        rounds.append(asking.secondary_round(profile, train, asking.compose(profile, test)))
    adapter = arm != BASE and profile.train.method == "lora"
    out = {}
    for one in rounds:
        how = one.how(profile.evaluate)
        for _, _, prompt in one.prompts():
            ids = {"prompt_ids": prompt_ids(tokenizer, prompt)}
            out[_key(prompt, how)] = ids | how | {"adapter": f"{arm}-s{seed}" if adapter else None}
    return out


def _key(prompt, how):
    return hashlib.sha256(json.dumps([prompt, how], sort_keys=True).encode()).hexdigest()


def _job(profile, folder, tokenizer, requests, paths):
    """What `vllm_worker` is asked to do, as JSON values."""
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # none beside the model
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        generation = GenerationConfig.from_model_config(config)
    stops = stop_ids(generation, tokenizer)
    listed = [one for asked in requests.values() for one in asked.values()]
    ranks = [profile.recipe(arm).lora_rank for arm, _ in requests if arm != BASE]
    used = {one["adapter"] for one in listed if one["adapter"]}
    adapters = {
        f"{arm}-s{seed}": str(paths.run(arm, seed) / "adapter")
        for arm, seed in requests
        if f"{arm}-s{seed}" in used
    }
    return {
        "model": str(folder),
        "tokenizer": str(model_folder(profile.model, "bf16")),
        "dtype": "bfloat16",
        "max_model_len": max(len(one["prompt_ids"]) + one["max_new_tokens"] for one in listed),
        "max_num_seqs": profile.evaluate.answer_batch_size,
        "max_lora_rank": min(rank for rank in RANKS if rank >= max(ranks, default=1)),
        "adapters": adapters,
        "stops": stops,
        "exempt": sorted({*stops, tokenizer.pad_token_id}),
        "requests": listed,
    }


def _run(executable, job, log):
    """{"version", "tokens"}: what the worker wrote. Its own output goes to the file `log`."""
    # Not our packages: the other environment has its own versions of them. On a CPU vLLM would
    # take most of the memory for its cache; 4 GiB hold 300,000 tokens of a small model.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(job), "utf-8")
        with open(log, "w", encoding="utf-8") as file:
            command = [executable, str(WORKER), str(asked), str(answered)]
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder
            ).returncode
        if code:
            text = log.read_text("utf-8", errors="replace")
            said = re.findall(r"\w*(?:Error|Exception|Interrupt): .*", text) or ["no reason given"]
            raise RuntimeError(
                f"vLLM ended with code {code} ({said[-1][:160]}), its log is"
                f" {os.path.relpath(log, files.ROOT)}: mend that, or set"
                " evaluate.answer_engine: transformers"
            )
        return json.loads(answered.read_text("utf-8"))
