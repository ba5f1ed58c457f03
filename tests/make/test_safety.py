"""Files from elsewhere are data: nothing in them is run."""

import ast
import json
import os
import pickle

import pytest
import torch
from tiny import CUT, Lab

from neft_utils.base.paths import NOTEBOOKS, PACKAGE
from neft_utils.base.profiles import Model
from neft_utils.base.strict import ConfigError
from neft_utils.train import run_log
from neft_utils.train.base_models import load_base, load_tokenizer

CODE = """
open({marker!r}, "w").close()
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
"""


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def model_folder(tmp_path):
    folder, nano = tmp_path / "model", Model(source="nano")
    for part in (load_tokenizer(nano), load_base(nano, "bf16")):
        part.save_pretrained(folder)
    return folder


def test_code_that_comes_with_a_model_is_not_run(model_folder, tmp_path):
    marker = tmp_path / "ran"
    (model_folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    config_file = model_folder / "config.json"
    values = json.loads(config_file.read_text())
    values |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    config_file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="model.source"):
        load_base(Model(source=str(model_folder), base_weights="bf16"))
    assert not marker.exists()


def test_pickled_weights_are_not_read(model_folder, tmp_path):
    marker = tmp_path / "ran"
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        load_base(Model(source=str(model_folder), base_weights="bf16"))
    assert not marker.exists()


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    lab = Lab(tmp_path, monkeypatch, train={"checkpoint_steps": 1}).prepare()
    with pytest.raises(KeyboardInterrupt):
        lab.train("baseline", edits=[CUT])
    folder = lab.paths.run("baseline", 0) / "trainer"
    marker = tmp_path / "ran"
    torch.save({"state": Evil(marker)}, folder / "checkpoint-3" / "optimizer.pt")
    assert (folder / "checkpoint-3" / run_log.ROWS).exists()
    with pytest.raises(Exception, match="(?i)weights.only"):
        lab.train("baseline")
    assert not marker.exists()


def test_remote_code_is_trusted_nowhere():
    places = [(path.name, path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")]
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        places.append((path.name, "\n".join(code)))
    for name, text in places:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert node.value.value is False, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), name
                if called == "torch.load":
                    assert any(k.arg == "weights_only" for k in node.keywords), name
