"""Can this machine run the profile? Asked before anything starts, so that nothing is lost later.

Device, memory, disk and packages refuse with what to change; what is only missing (a download, a
judge's key) is said. A profile for a GPU never falls back to the CPU without a word.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from neft_utils.base import gguf, hub
from neft_utils.base.files import ROOT
from neft_utils.base.model_config import check_lengths
from neft_utils.base.paths import OWN_MODELS, find
from neft_utils.base.pins import pins
from neft_utils.base.provenance import without_bf16
from neft_utils.base.strict import ConfigError
from neft_utils.evaluate.vllm.locate import VARIABLE, vllm_python

ALPACA_EVAL = 805  # prompts that it has
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, bytes or "max"


def check(profile, here=True, any_versions=False):
    """[(what, what was found)] of everything that was looked at, as text.

    here: whether the runs take place on this machine; on a cluster its nodes' device and memory
    are the scheduler's to give. any_versions: other versions than the pinned ones are said, not
    refused. Raises ConfigError of one line for what cannot be.
    """
    found = [("packages", _packages(any_versions))]
    if here:
        found += [("device", _device(profile)), ("memory", _memory(profile))]
        if profile.device == "cuda" and profile.model.base_weights != "bf16":
            found.append(("4-bit weights", _bitsandbytes()))
    found.append(("disk", _disk(profile)))
    found.append(("model", _model(profile)))
    if fewer := _prompts(profile):
        found.append(("prompts", fewer))
    if profile.evaluate.answer_engine == "vllm":
        found.append(("answers", _answers(profile)))
    if profile.evaluate.judge is not None:
        found.append(("judge", _judge(profile.evaluate.judge)))
    return found


def _packages(any_versions):
    wrong = []
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong.append(f"{name} is {installed}, not {version}")
    if wrong and any_versions:
        return f"other versions than the pinned ones, which the tables will say: {'; '.join(wrong)}"
    if wrong:
        raise ConfigError(f"packages: {'; '.join(wrong[:3])}: run make env")
    return "as pinned"


def _bitsandbytes():
    """Which library of bitsandbytes serves torch's CUDA; ConfigError where it has none for it.

    It takes one of the same major version. Neither package is imported: that takes seconds.
    """
    folders = {name: _folder_of(name) for name in ("torch", "bitsandbytes")}
    if folders["bitsandbytes"] is None:
        raise ConfigError("bitsandbytes, which makes 4-bit weights, is not installed: run make env")
    cuda = None
    if folders["torch"] is not None and (file := folders["torch"] / "version.py").exists():
        found = re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", file.read_text("utf-8"), re.M)
        cuda = found and tuple(map(int, found.groups()))
    if cuda is None:
        return "torch is a build without CUDA here"  # which notebook 03 refuses
    libraries = sorted(folders["bitsandbytes"].glob("libbitsandbytes_cuda*.so"))
    versions = [library.stem.removeprefix("libbitsandbytes_cuda") for library in libraries]
    if not any(version.startswith(str(cuda[0])) for version in versions):
        raise ConfigError(
            f"bitsandbytes has no library for CUDA {cuda[0]}.{cuda[1]}, torch's here (it has"
            f" {', '.join(versions) or 'none'}): install another version of either"
        )
    return f"CUDA {cuda[0]}.{cuda[1]} by bitsandbytes ({', '.join(versions)})"


def _folder_of(package):
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def gpus():
    """[(name, memory in GB)] of the GPUs that nvidia-smi lists; empty without it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if not done.returncode]
    # nvidia-smi counts in MiB.
    return [(name.strip(), float(size) * 2**20 / 1e9) for name, _, size in rows]


def _device(profile):
    if profile.device == "cpu":
        slow = ", without instructions for bf16: four times the time"
        return f"CPU, {cores()} cores" + (slow if without_bf16() else "")
    cards = gpus()
    if not cards:
        raise ConfigError(
            f"profile {profile.name} needs a GPU and none is here: use PROFILE=cpu, or"
            " ENGINE=slurm where a cluster has them"
        )
    name, size = max(cards, key=lambda card: card[1])
    if size < profile.gpu_memory_gb:
        raise ConfigError(
            f"profile {profile.name} needs {profile.gpu_memory_gb:g} GB of GPU memory, {name} has"
            f" {size:.0f}: lower train.micro_batch_tokens and gpu_memory_gb in a copy of the"
            " profile, or use base_weights nf4"
        )
    return f"{name}, {size:.0f} GB"


def _memory(profile):
    have = memory_gb()
    if have < profile.memory_gb:
        raise ConfigError(
            f"profile {profile.name} needs {profile.memory_gb:g} GB of memory a run, here are"
            f" {have:.0f}: lower train.micro_batch_tokens and memory_gb in a copy of the profile"
        )
    return f"{have:.0f} GB, {profile.memory_gb:g} a run"


def _disk(profile):
    # What an earlier start put there need not fit again.
    used = sum(kept().values())
    free, wanted = shutil.disk_usage(ROOT).free / 1e9, max(profile.disk_gb - used, 0.5)
    if free < wanted:
        raise ConfigError(
            f"profile {profile.name} needs {wanted:.1f} GB more of disk, free are {free:.1f}:"
            " free some space"
        )
    return f"{free:.0f} GB free"


def kept():
    """{path below the root: size in GB} of what was downloaded or made of downloads."""
    tops = (ROOT / "data" / name for name in ("wheels", "models", "downloads"))
    paths = [path for top in tops if top.is_dir() for path in top.iterdir()]
    return {str(path.relative_to(ROOT)): _size(path) for path in paths}


def _size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e9


def _prompts(profile):
    """What of the profile asks for more rows than it has, as text; a run takes those there are."""
    asked, rows = profile.evaluate, profile.data
    smallest = min(profile.data_fraction(arm) for arm in profile.arms)
    train = max(1, round(smallest * rows.train_rows))
    judged = asked.alpaca_eval_prompts or min(asked.answer_prompts, rows.test_rows)
    limits = {
        "answer_prompts": (rows.test_rows, "test rows"),
        "answer_prompts_without_penalty": (rows.test_rows, "test rows"),
        "length_arm_prompts": (rows.test_rows, "test rows"),
        "stability_rows": (rows.test_rows, "test rows"),
        "train_rows": (train, "training rows"),
        "train_answer_prompts": (train, "training rows"),
        "alpaca_eval_prompts": (ALPACA_EVAL, "prompts of AlpacaEval"),
    }
    asked_for = [(name, getattr(asked, name), *limit) for name, limit in limits.items()]
    if asked.judge is not None:
        asked_for.append(("judge.prompts", asked.judge.prompts, judged, "answers"))
    return "; ".join(
        f"evaluate.{name} asks for {count}, there are {have} {what}: {have} are taken"
        for name, count, have, what in asked_for
        if count is not None and count > have
    )


def _model(profile):
    """Where the model is, as text. What its config.json has no room for is refused here too, and
    not after training: answers belong to no key of notebook 01, which looks once more."""
    model = profile.model
    for folder in (Path(model.source).expanduser(), ROOT / model.source, *_made(model.source)):
        if (folder / "config.json").is_file():
            check_lengths(profile, _config(folder / "config.json"))
            break
    if model.source in gguf.MODELS:
        terms = gguf.MODELS[model.source].terms
        place = "in the cache" if gguf.is_cached(model.source) else "to be downloaded"
        return f"{model.source}, {place}" + (f"; {terms}" if terms else "")
    if model.source == "nano" or ((folder := find(model.source)) and folder.is_dir()):
        return model.source
    return f"{model.source}, " + hub.state(model.source, model.revision, "model.source")


def _made(source):
    """The folder that notebook 01 made of a pinned wheel, or of `nano`: a list of at most one."""
    if source not in OWN_MODELS:
        return []
    name = source if source == "nano" else f"{source}-{gguf.version_of(source)}"
    return [ROOT / "data" / "models" / name]


def _config(path):
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"model.source: {path} is no JSON object: get the model again")
    return values


def _answers(profile):
    found = vllm_python(profile)
    if found is None:
        return (
            "from transformers, run after run: vLLM is not installed here"
            f" ({VARIABLE} names a Python that has it)"
        )
    return f"from vLLM, all runs in one engine ({found})"


def _judge(judge):
    if judge.reward_model is not None:
        key = "evaluate.judge.reward_model"
        return f"{judge.reward_model}, {hub.state(judge.reward_model, judge.revision, key)}"
    if os.environ.get(judge.key_variable):
        return f"{judge.model}, at most {judge.max_usd:g} USD a run"
    return f"{judge.key_variable} is not set: preferences will be left out"


def cores():
    """Cores that this process may use, which in a container or a batch job are not all."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def memory_gb():
    """Memory of this machine, or of the container if that has less, in GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if LIMIT.exists() and (text := LIMIT.read_text("utf-8").strip()).isdigit():
        memory = min(memory, int(text))
    return memory / 1e9
