"""The profiles of the paper's scale, run whole at nano sizes: hub, loaders, methods and arms.

Models and rows come from a hub on the loopback address, through huggingface_hub's own client: a
tiny random Llama without a chat template, and our own rows in Alpaca's columns.
"""

import json

import pytest
import yaml
from chains import copy_of_the_repository, neft
from loopback import COMMIT, hub

from neft_utils.base.paths import PROFILES
from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.data.sources import own_rows
from neft_utils.train.base_models import load_base, load_tokenizer

NAMES = sorted(p.stem for p in PROFILES.glob("*.yaml") if "device: cuda" in p.read_text("utf-8"))
ONE = "llama2-7b-alpaca-full"  # in every run of the tests, the others in make test-all


def nano_copy(name, folder):
    """Path of a profile with the same arms, method, loaders and measures at nano sizes."""
    values = yaml.safe_load((PROFILES / f"{name}.yaml").read_text("utf-8"))
    remote = {"source": "owner/tiny-llama", "revision": COMMIT}
    values["model"] |= remote if "/" in values["model"]["source"] else {"source": "nano"}
    alpaca = {"source": "alpaca", "path": "owner/rows", "revision": COMMIT}
    values["data"] = alpaca if values["data"]["source"] == "alpaca" else {"source": "nano"}
    values["data"] |= {"max_tokens": 400, "train_rows": 8, "validation_rows": 4, "test_rows": 6}
    sizes = {"epochs": 1, "batch_size": 4, "micro_batch_tokens": 500, "learning_rate": 1e-3}
    values["train"] |= sizes | {"lora_rank": 4, "optimizer": "adamw"}
    if "checkpoint_steps" in values["train"]:
        values["train"]["checkpoint_steps"] = 1
    asked = {"answer_prompts": 2, "max_new_tokens": 8, "answer_batch_size": 8, "train_rows": 4}
    kept = ("answer_seeds", "secondary_seeds", "judge")
    asked |= {key: values["evaluate"][key] for key in kept if key in values["evaluate"]}
    if "length_arm_prompts" in values["evaluate"]:
        asked["length_arm_prompts"] = 2
    if "stability_rows" in values["evaluate"]:
        asked["stability_rows"] = 2
    values["seeds"] = values["seeds"][: 1 if len(values["arms"]) > 9 else 2]  # minutes, not ten
    for arm in values["arms"].values():
        if "seeds" in arm:
            arm["seeds"] = arm["seeds"][:1]
    for key in ("answer_seeds", "secondary_seeds"):
        asked[key] = [seed for seed in asked.get(key, []) if seed in values["seeds"]]
    values |= {"evaluate": asked | {"verifiable_per_family": 1}, "device": "cpu"}
    values |= {"memory_gb": 1.5, "gpu_memory_gb": 0, "disk_gb": 0.5}
    path = folder / f"{name}-nano.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    return path


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """{(kind, name): folder} for the hub."""
    folder = tmp_path_factory.mktemp("hub")
    nano = Model(source="nano")
    tokenizer = load_tokenizer(nano)
    tokenizer.chat_template = None
    for part in (tokenizer, load_base(nano, "bf16")):
        part.save_pretrained(folder / "tiny-llama")
    (folder / "rows").mkdir()
    rows = [
        {
            "instruction": row["prompt"],
            "input": "Answer in one sentence." if n % 3 == 0 else "",
            "output": row["response"],
        }
        for n, row in enumerate(own_rows())
    ]
    (folder / "rows" / "train.json").write_text(json.dumps(rows), "utf-8")
    return {
        ("models", "owner/tiny-llama"): folder / "tiny-llama",
        ("datasets", "owner/rows"): folder / "rows",
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == ONE else pytest.mark.slow) for n in NAMES]
)
def test_a_profile_of_the_papers_scale_runs_whole_at_nano_sizes(name, repositories, tmp_path):
    folder, profile = copy_of_the_repository(tmp_path), nano_copy(name, tmp_path)
    place = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    with hub(repositories) as (address, asked):
        done = neft(folder, "reproduce", "--profile", profile, HF_ENDPOINT=address, **place)
        assert done.returncode == 0, done.stdout + done.stderr
        from_hub = "/" in load_profile(name).model.source
        assert any("owner/tiny-llama" in path for path in asked) == from_hub
    results = folder / "results" / "local" / profile.stem
    runs = {path.parent.name for path in results.glob("runs/*/scores.json")}
    small = load_profile(profile)
    assert runs == {"base-s0", *(f"{arm}-s{seed}" for arm, seed in small.runs())}
    for arm, seed in small.runs():
        noise = json.loads((results / "runs" / f"{arm}-s{seed}" / "noise.json").read_text("utf-8"))
        change = small.arms[arm]
        assert noise["noise_alpha"] == change.noise_alpha
        assert bool(noise["tokens"]) == bool(change.noise_alpha)
        if change.noise_alpha and change.length == "sequence" and change.where == "all":
            assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.05)
    manifest = json.loads((results / "manifest.json").read_text("utf-8"))
    assert manifest["revision"] == (COMMIT if small.data.source == "alpaca" else None)
    claims = json.loads((results / "claims.json").read_text("utf-8"))
    by_id = {row["id"]: row for row in claims}
    assert by_id["content_nll"]["primary"] and by_id["content_nll"]["estimate"] is not None
    if small.evaluate.judge:
        scores = json.loads((results / "runs" / "base-s0" / "scores.json").read_text("utf-8"))
        assert small.evaluate.judge.key_variable in scores["judge"]["left_out"]
    # Everything is in the cache now: the same call needs no hub, and has nothing to do.
    again = neft(folder, "reproduce", "--profile", profile, HF_HUB_OFFLINE="1", **place)
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.parametrize("name", NAMES)
def test_what_a_profile_takes_can_be_asked_without_its_model(name):
    from neft_utils.base.estimate import estimate
    from neft_utils.base.paths import Paths

    profile = load_profile(name)
    assert profile.gpu_memory_gb and profile.memory_gb and profile.disk_gb
    rows = estimate(profile, Paths(profile.name, "nowhere"))
    assert all(steps >= 0 and seconds >= 0 for _, steps, _, seconds in rows)
    assert sum(row[3] for row in rows) / 3600 < 24  # a day on one card at most
    if "/" in profile.model.source:
        assert len(profile.model.revision) == 40
