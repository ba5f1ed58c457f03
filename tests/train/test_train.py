"""Notebook 03 on the nano model: reproducible, paired between arms, clean after exceptions."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import CUT, Lab
from transformers import AutoModelForCausalLM, TrainerCallback

from neft_utils.base.files import sha256_file
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import curves
from neft_utils.data.sources import DataError
from neft_utils.noise import NEFTuneCallback
from neft_utils.train import record, run_log
from neft_utils.train.base_models import load_base
from neft_utils.train.losses import response_losses
from neft_utils.train.memory import out_of_memory
from neft_utils.train.run_log import RunLog

TRAIN = "with recorded("  # the cell that trains


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A function that makes a prepared Lab."""
    return lambda **changes: Lab(tmp_path, monkeypatch, **changes).prepare()


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_writes_its_files_and_the_same_seed_gives_the_same_bits(lab):
    nano = lab()
    run = nano.train()["run"].folder
    log = pd.read_csv(run / "train_log.csv")
    assert list(log.columns) == run_log.LOG_COLUMNS
    assert log.step.tolist() == [0, 1, 2, 3, 4]
    assert log.validation_nll.notna().tolist() == [True, False, True, False, True]
    curve = pd.read_csv(run / "losses_by_epoch.csv")
    assert list(curve.columns) == run_log.CURVE_COLUMNS and set(curve.split) == {"validation"}
    means = curve.groupby("epoch").nll.mean()
    assert means.tolist() == pytest.approx(log.validation_nll.dropna().tolist(), abs=1e-5)
    noise = json.loads((run / "noise.json").read_text())
    assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.02)
    assert noise["calls"] > 2 * nano.profile.train.epochs  # batches of 8, each in parts
    about = json.loads((run / "provenance.json").read_text())
    assert about["adapter_sha256"] == sha256_file(run / "adapter" / "adapter_model.safetensors")
    for name in (
        "commit",
        "dirty",
        "versions",
        "device",
        "threads",
        "seconds",
        "peak_memory_gb",
        "tokens_per_second",
        "padded_tokens_per_second",
    ):
        assert name in about
    assert not (run / "trainer").exists()
    first = weights(run)
    assert all(w.dtype == torch.float32 for w in first.values())
    torch.rand(7)  # whatever else drew random numbers must not matter
    again = weights(nano.train()["run"].folder)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_notebook_twice_in_one_kernel_gives_the_same_bits(lab):
    nano = lab()
    names = nano.train()
    first = weights(names["run"].folder)
    again = weights(nano.train(namespace=names)["run"].folder)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_was_saved_is_what_was_trained(lab):
    names = lab().train()
    ids = torch.arange(2, 40)[None]
    trained, loaded = names["trainer"].model.eval(), names["tuned"]
    assert isinstance(loaded, PeftModel) and not loaded.training
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (trained, loaded))
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)  # in bf16
    assert isinstance(names["before"], str)


def test_arms_of_a_seed_differ_by_the_noise_alone(lab):
    """α = 0 through the noise equals no noise; α > 0 starts from the same adapters and rows."""
    nano = lab()
    quiet, noisy = (nano.train(arm)["run"].folder for arm in ("baseline", "neft_a15"))
    a, b = (pd.read_csv(run / "train_log.csv") for run in (quiet, noisy))
    assert a.validation_nll[0] == b.validation_nll[0]  # same weights before training
    assert a.learning_rate.equals(b.learning_rate) and a.tokens.equals(b.tokens)
    assert not a.train_loss.equals(b.train_loss)
    assert json.loads((quiet / "noise.json").read_text())["tokens"] == 0


def test_data_order_and_dropout_masks_are_those_of_the_run_without_noise(lab):
    nano = lab(train={"lora_dropout": 0.5})

    def batches_and_masks(arm):
        seen, masks = [], []
        trainer = nano.train(arm, until=TRAIN)["trainer"]
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        layer = next(x for x in trainer.model.modules() if isinstance(x, torch.nn.Dropout))
        layer.register_forward_hook(
            lambda module, args, out: masks.append((args[0] != 0, out == 0))
        )
        trainer.train()
        return seen, masks

    quiet, noisy = batches_and_masks("baseline"), batches_and_masks("neft_a15")
    assert len(quiet[0]) == len(noisy[0]) > 0
    assert all(torch.equal(x, y) for x, y in zip(quiet[0], noisy[0], strict=True))
    dropped_share = []
    for (live, dropped), (live_too, dropped_too) in zip(quiet[1], noisy[1], strict=True):
        both = live & live_too  # where the input is 0 anyway, a mask does not show
        if both.float().mean() < 0.9:  # no dropout while validation rows are scored
            continue
        dropped_share.append(dropped[both].float().mean().item())
        assert torch.equal(dropped[both], dropped_too[both])
    assert max(dropped_share) > 0.4 and max(dropped_share) < 0.6


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of something"), KeyboardInterrupt()])
def test_noise_is_gone_after_an_exception_in_training(lab, error):
    names = lab().train(until=TRAIN)
    names["trainer"].add_callback(Stop(error))
    with pytest.raises(type(error)):
        names["trainer"].train()
    assert names["noise"].report()["calls"] > 0 and not names["noise"].noise.attached


def test_a_loss_that_is_not_finite_stops_the_run(lab):
    nano = lab(train={"max_grad_norm": 1e30})
    far = ("learning_rate=recipe.learning_rate", "learning_rate=1e30")
    with pytest.raises(FloatingPointError, match="lower train.learning_rate or noise_alpha"):
        nano.train(edits=[far])
    assert not (nano.paths.run("neft_a15", 0) / "provenance.json").exists()


STARVED = """
import resource, torch
from neft_utils.base.profiles import Model
from neft_utils.train.base_models import load_base
from neft_utils.train.encoding import flat_batch
from neft_utils.train.losses import response_token_nll
from neft_utils.train.memory import out_of_memory
base = load_base(Model(source="nano"), "bf16")
one = {"input_ids": [5] * 500, "completion_mask": [0] * 100 + [1] * 400}
response_token_nll(base, flat_batch([one]))[0].sum().backward()  # libraries are loaded now
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 50_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with out_of_memory("train.micro_batch_tokens", 200_000):
    response_token_nll(base, flat_batch([one] * 400))[0].sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_running_out_of_memory_names_the_setting_to_lower():
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "MemoryError: out of memory: lower train.micro_batch_tokens (now 200000)"
    )
    assert "finished steps are kept" in last
    assert done.stderr.count("Traceback") == 1  # the allocator's own message is not shown


def test_other_errors_are_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes differ"), out_of_memory("x", 1):
        raise RuntimeError("shapes differ")


def test_checkpointing_changes_memory_not_gradients(lab):
    runs = []
    for on in (False, True):
        names = lab(train={"gradient_checkpointing": on}).train()
        assert names["model"].get_base_model().model.gradient_checkpointing == on
        runs.append(weights(names["run"].folder))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_base_kept_in_4_bits_trains_the_same_start_and_says_its_bytes(lab, capsys):
    """The adapters start from the same float32 numbers, which TRL would round on a 4-bit base."""
    starts = []
    for held in ("nf4", "nf4_dequantized"):
        names = lab(model={"base_weights": held}, evaluate={"stability_rows": 0}).train(until=TRAIN)
        parts = names["model"].named_parameters()
        starts.append({n: p.detach() for n, p in parts if p.requires_grad})
        said = "0.04 MB in use" if held == "nf4" else "0.15 MB in use"
        assert f"0.04 MB as loaded, {said}" in capsys.readouterr().out
    assert starts[0].keys() == starts[1].keys()
    assert all(p.dtype == torch.float32 for p in starts[0].values())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_full_fine_tuning_trains_saves_and_loads_every_weight(lab):
    nano = lab(
        train={"method": "full", "learning_rate": 1e-3},
        model={"base_weights": "bf16"},
        evaluate={"length_arm_prompts": 0},
    )
    run = nano.train()["run"].folder
    assert (run / "model" / "model.safetensors").exists() and not (run / "adapter").exists()
    before = load_base(nano.profile.model)
    after = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(moved)
    log = pd.read_csv(run / "train_log.csv").validation_nll.dropna()
    assert log.iloc[-1] < log.iloc[0]
    about = json.loads((run / "provenance.json").read_text())
    assert about["trainable_parameters"] == sum(p.numel() for p in after.parameters())
    assert about["model_gflops_per_second"] > 0
    noise = json.loads((run / "noise.json").read_text())
    assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.02)
    assert nano.score()["losses"].nll.gt(0).all()


# ------------------------------------------------------------------- checkpoints and bad input


def cut(nano, arm="neft_a15"):
    """Train until it is cut; returns the folder with the checkpoints."""
    with pytest.raises(KeyboardInterrupt):
        nano.train(arm, edits=[CUT])
    return nano.paths.run(arm, 0) / "trainer"


def test_a_cut_run_goes_on_from_its_checkpoint_to_the_same_bits(lab, capsys):
    scored = {"validate_epochs": 2, "validate_train": True}
    often = lab(train={"checkpoint_steps": 1, "lora_dropout": 0.1, "epochs": 3, **scored})
    run = often.train()["run"].folder
    whole = weights(run)
    curve = (run / "losses_by_epoch.csv").read_text()
    log = pd.read_csv(run / "train_log.csv").drop(columns="seconds")
    folder = cut(often)
    assert not (run / "provenance.json").exists()  # this run is not whole
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]
    (folder / "checkpoint-3" / run_log.ROWS).unlink()  # cut while it was written
    capsys.readouterr()
    often.train()
    assert "goes on at step 2/6" in capsys.readouterr().out
    assert json.loads((run / "noise.json").read_text())["from_step"] == 2
    again = weights(run)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    resumed = pd.read_csv(run / "train_log.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(log, resumed)
    assert (run / "losses_by_epoch.csv").read_text() == curve


def test_losses_are_written_every_few_epochs_of_the_training_rows_too(lab):
    nano = lab(train={"epochs": 3, "validate_epochs": 2, "validate_train": True})
    names = nano.train()
    curve = pd.read_csv(names["run"].folder / "losses_by_epoch.csv")
    counts = curve.groupby(["epoch", "split"]).size().to_dict()
    rows = {"train": len(names["train"]), "validation": len(names["validation"])}
    assert counts == {(epoch, s): rows[s] for epoch in (0, 2, 3) for s in rows}  # 3: the last
    at_last = curve[(curve.epoch == 3) & (curve.split == "train")]
    trained = names["model"].eval()
    nll, end = response_losses(trained, names["train"], 400)
    assert at_last.nll.tolist() == pytest.approx(nll, abs=2e-6)
    assert at_last.end_nll.tolist() == pytest.approx(end, abs=2e-6)
    assert at_last.n_tokens.tolist() == [sum(one["completion_mask"]) for one in names["train"]]
    first = curve[(curve.epoch == 0) & (curve.split == "train")]
    assert at_last.nll.mean() < first.nll.mean()
    # What notebook 5 makes of the file: content alone, by tokens.
    read = curves.curve_of({"curve": curve, "provenance": {"arm": "neft_a15", "seed": 0}})
    means, sizes = curves.by_epoch(read), at_last.n_tokens
    content = (at_last.nll * sizes - at_last.end_nll).sum() / (sizes - 1).sum()
    assert means.train_content[3] == pytest.approx(content)
    assert list(means.index) == [0, 2, 3] and curves.best_epoch(read) in means.index


@pytest.mark.parametrize(
    "edit",
    [
        ("weight_decay=recipe.weight_decay,", "weight_decay=0.5,"),
        ("lora_alpha=recipe.lora_alpha,", "lora_alpha=1,"),
        ("    arm.noise_alpha,\n", "    5.0,\n"),
        ("train_rows(profile, ARM, SEED, paths)]", "train_rows(profile, ARM, SEED, paths)][::-1]"),
    ],
    ids=["settings", "adapters", "noise", "rows"],
)
def test_a_checkpoint_of_a_changed_cell_is_no_beginning(lab, capsys, edit):
    often = lab(train={"checkpoint_steps": 1})
    cut(often)
    often.train(edits=[edit], until="history = pd.read_csv")
    said = capsys.readouterr().out
    assert record.OTHER in said and "goes on" not in said
    noise = json.loads((often.paths.run("neft_a15", 0) / "noise.json").read_text())
    assert "from_step" not in noise


def test_a_saved_change_of_the_notebook_makes_its_checkpoint_no_beginning(lab, monkeypatch, capsys):
    often = lab(train={"checkpoint_steps": 1})
    cut(often)
    monkeypatch.setattr(record, "step_key", lambda *run: "another")
    often.train()
    assert record.OTHER in capsys.readouterr().out


def test_the_training_cell_again_is_refused_but_goes_on_from_a_checkpoint(lab):
    nano = lab()
    names = nano.train()
    again = {"namespace": names, "until": "history = pd.read_csv"}
    with (
        pytest.raises(RuntimeError, match="this trainer has trained already.*run the notebook"),
        record.recorded(names["trainer"], nano.profile, "neft_a15", 0, nano.paths),
    ):
        pytest.fail("trains again")
    assert nano.train(**again)["run"].weights.exists()  # from the top it is fine


def test_a_run_that_saves_nothing_is_not_whole(lab):
    nano = lab()
    names = nano.train(until=TRAIN)
    with (
        pytest.raises(RuntimeError, match="is missing: save the model inside"),
        record.recorded(names["trainer"], nano.profile, "neft_a15", 0, nano.paths),
    ):
        names["trainer"].train()
    assert not (nano.paths.run("neft_a15", 0) / "provenance.json").exists()


def test_a_trainer_without_a_log_or_the_noise_is_refused(lab):
    nano = lab()
    trainer = nano.train(until=TRAIN)["trainer"]
    for kind in (RunLog, NEFTuneCallback):
        callback = trainer.pop_callback(kind)
        with (
            pytest.raises(RuntimeError, match=f"needs one {kind.__name__}, it has 0"),
            record.recorded(trainer, nano.profile, "neft_a15", 0, nano.paths),
        ):
            pytest.fail("trains")
        trainer.add_callback(callback)


def test_unknown_arm_and_missing_data_are_said_before_any_work(tmp_path, monkeypatch):
    nowhere = Lab(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="no arm 'neft'"):
        nowhere.train("neft")
    with pytest.raises(DataError, match="run notebook 01 first"):
        nowhere.train("baseline")
    with pytest.raises(ConfigError, match="neft_a15-s0 is not trained: run notebook 03 with ARM"):
        nowhere.score()
    assert not (tmp_path / "results").exists()
    assert load_profile("nano").seeds == (0, 1)
