"""One run on the nano model: reproducible, paired between arms, and clean after exceptions."""

import json
import math
import subprocess
import sys

import pandas as pd
import pytest
import torch
from tiny import cut_run, places, prepare, saving, silent
from transformers import TrainerCallback

from neft_utils.base.files import sha256_file
from neft_utils.base.paths import BASE
from neft_utils.base.read_profile import load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.compare import claims, tables
from neft_utils.compare.results import Results
from neft_utils.data import splits
from neft_utils.evaluate import tasks
from neft_utils.noise import NEFTuneCallback
from neft_utils.train import run_log
from neft_utils.train.base_models import load_base, load_run, load_tokenizer, parameter_counts
from neft_utils.train.encoding import encode
from neft_utils.train.finetune import finetune
from neft_utils.train.losses import out_of_memory
from neft_utils.train.trainer import build_trainer, lora_model


@pytest.fixture(scope="module")
def profile():
    return load_profile("nano")


@pytest.fixture(scope="module")
def prepared(profile, tmp_path_factory):
    """Processed nano data, in a folder of this test run."""
    folder = tmp_path_factory.mktemp("processed")
    prepare(profile, folder)
    return folder


@pytest.fixture
def paths(profile, prepared, tmp_path):
    return places(profile, tmp_path, prepared)


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_writes_its_files_and_the_same_seed_gives_the_same_bits(profile, paths, tmp_path):
    run = finetune(profile, "neft_a15", 0, paths, silent)
    log = pd.read_csv(run / "train_log.csv")
    assert list(log.columns) == run_log.LOG_COLUMNS
    assert log.step.tolist() == [0, 1, 2, 3, 4]
    assert log.validation_nll.notna().tolist() == [True, False, True, False, True]
    noise = json.loads((run / "noise.json").read_text())
    assert noise["noise_rms"] == pytest.approx(noise["expected_rms"], rel=0.02)
    assert noise["calls"] > 2 * profile.train.epochs  # 16 rows, batches of 8, each in parts
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
    first = weights(run)
    assert all(w.dtype == torch.float32 for w in first.values())
    torch.rand(7)  # whatever else drew random numbers must not matter
    again = weights(finetune(profile, "neft_a15", 0, paths, silent))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_arms_of_a_seed_differ_by_the_noise_alone(profile, paths):
    """α = 0 through the noise equals no noise; α > 0 starts from the same adapters and rows."""
    quiet = finetune(profile, "baseline", 0, paths, silent)
    noisy = finetune(profile, "neft_a15", 0, paths, silent)
    a, b = (pd.read_csv(run / "train_log.csv") for run in (quiet, noisy))
    assert a.validation_nll[0] == b.validation_nll[0]  # same weights before training
    assert a.learning_rate.equals(b.learning_rate) and a.tokens.equals(b.tokens)
    assert not a.train_loss.equals(b.train_loss)
    assert json.loads((quiet / "noise.json").read_text())["tokens"] == 0


def recording_trainer(profile, prepared, callbacks, dropout=0.0):
    import dataclasses

    recipe = dataclasses.replace(profile.train, lora_dropout=dropout, epochs=1)
    tokenizer = load_tokenizer(profile.model)
    encoded = [encode(tokenizer, row) for row in splits.load_split(prepared, "train-s0")]
    model = lora_model(load_base(profile.model), recipe, 0)
    return build_trainer(model, tokenizer, encoded, recipe, 0, callbacks, prepared / "t")


def test_data_order_and_dropout_masks_are_those_of_the_run_without_noise(profile, prepared):
    def batches_and_masks(noise_alpha):
        seen, masks = [], []
        callback = NEFTuneCallback(noise_alpha)
        trainer = recording_trainer(profile, prepared, [callback], dropout=0.5)
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        layer = next(x for x in trainer.model.modules() if isinstance(x, torch.nn.Dropout))
        layer.register_forward_hook(
            lambda module, args, out: masks.append((args[0] != 0, out == 0))
        )
        trainer.train()
        return seen, masks

    quiet, noisy = batches_and_masks(0.0), batches_and_masks(15.0)
    assert len(quiet[0]) == len(noisy[0]) > 0
    assert all(torch.equal(x, y) for x, y in zip(quiet[0], noisy[0], strict=True))
    for (live, dropped), (live_too, dropped_too) in zip(quiet[1], noisy[1], strict=True):
        both = live & live_too  # where the input is 0 anyway, a mask does not show
        assert both.float().mean() > 0.9 and 0.4 < dropped[both].float().mean() < 0.6
        assert torch.equal(dropped[both], dropped_too[both])


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of something"), KeyboardInterrupt()])
def test_noise_is_gone_after_an_exception_in_training(profile, prepared, error):
    callback = NEFTuneCallback(15.0)
    trainer = recording_trainer(profile, prepared, [callback, Stop(error)])
    with pytest.raises(type(error)):
        trainer.train()
    assert callback.report()["calls"] > 0 and not callback.noise.attached


def test_a_loss_that_is_not_finite_stops_the_run(profile, prepared):
    import dataclasses

    wild = dataclasses.replace(profile.train, learning_rate=1e30, max_grad_norm=1e30)
    tokenizer = load_tokenizer(profile.model)
    encoded = [encode(tokenizer, row) for row in splits.load_split(prepared, "train-s0")]
    model = lora_model(load_base(profile.model), wild, 0)
    log = run_log.RunLog(model, lambda step: 0, encoded[:2], 512, silent)
    trainer = build_trainer(model, tokenizer, encoded, wild, 0, [log], prepared / "t")
    with pytest.raises(FloatingPointError, match="lower train.learning_rate or noise_alpha"):
        trainer.train()


STARVED = """
import resource, torch
from neft_utils.base.profiles import Model
from neft_utils.train.base_models import load_base
from neft_utils.train.encoding import flat_batch
from neft_utils.train.losses import out_of_memory, response_token_nll
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


def test_checkpointing_changes_memory_not_gradients(profile, prepared):
    import dataclasses

    runs = []
    for on in (False, True):
        recipe = dataclasses.replace(profile.train, gradient_checkpointing=on, epochs=1)
        tokenizer = load_tokenizer(profile.model)
        encoded = [encode(tokenizer, row) for row in splits.load_split(prepared, "train-s0")]
        model = lora_model(load_base(profile.model), recipe, 0)
        callback = NEFTuneCallback(15.0)
        folder = prepared / "t"
        trainer = build_trainer(model, tokenizer, encoded, recipe, 0, [callback], folder)
        trainer.train()
        assert model.get_base_model().model.gradient_checkpointing == on
        runs.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_full_fine_tuning_trains_saves_and_loads_every_weight(profile, paths):
    import dataclasses

    recipe = dataclasses.replace(profile.train, method="full", learning_rate=1e-3)
    model = dataclasses.replace(profile.model, base_weights="bf16")
    whole = dataclasses.replace(profile, train=recipe, model=model)
    run = finetune(whole, "neft_a15", 0, paths, silent)
    assert (run / "model" / "model.safetensors").exists() and not (run / "adapter").exists()
    before, after = (load_base(model), load_run(model, run))
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


def test_a_cut_run_goes_on_from_its_checkpoint_to_the_same_bits(profile, paths, monkeypatch):
    often = saving(profile, lora_dropout=0.1)
    whole = weights(finetune(often, "neft_a15", 0, paths, silent))
    assert not (paths.run("neft_a15", 0) / "trainer").exists()
    log = pd.read_csv(paths.run("neft_a15", 0) / "train_log.csv").drop(columns="seconds")
    folder = cut_run(often, "neft_a15", paths, monkeypatch)
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]
    (folder / "checkpoint-3" / run_log.ROWS).unlink()  # cut while it was written
    said = []
    run = finetune(often, "neft_a15", 0, paths, said.append)
    assert said[0] == "goes on at step 2/4"
    assert json.loads((run / "noise.json").read_text())["from_step"] == 2
    again = weights(run)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    resumed = pd.read_csv(run / "train_log.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(log, resumed)


def test_the_base_is_scored_on_the_rows_of_the_first_seed_there_is(profile, paths):
    import dataclasses

    late = dataclasses.replace(profile, seeds=(1,))
    rows = tasks.split_rows(late, BASE, 0, paths, "train")
    assert rows == splits.load_split(paths.processed, "train-s1")
    assert late.answers("baseline", 1) and not profile.answers("baseline", 1)


def test_unknown_arm_and_missing_data_are_said_before_any_work(profile, tmp_path):
    nowhere = places(profile, tmp_path, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no arm 'neft'"):
        finetune(profile, "neft", 0, nowhere, silent)
    with pytest.raises(splits.DataError, match="run notebook 01 first"):
        finetune(profile, "baseline", 0, nowhere, silent)


LEDGER = [
    "confirmatory",
    "better_answers",
    "reasoning",
    "less_overfitting",
    "low_data",
    "much_data",
    "alpha_sensitive",
    "too_strong_breaks",
    "across_models",
    "longer_answers",
    "beyond_length",
    "concise_tasks",
    "no_new_knowledge",
    "input_robustness",
    "flat_minimum",
    "vs_dropout_decay",
    "inference_cost",
    "training_cost",
    "few_lines",
]


def _check_secondary(profile, paths, rows):
    """Seed 0 has the secondary measures, seed 1 has not; Table 5's arms by role."""
    settings, run = profile.evaluate, paths.run("neft_a15", 0)
    sets = pd.DataFrame(rows).groupby("set").size().to_dict()
    assert sets["verifiable"] == 3 * settings.verifiable_per_family
    assert sets["train"] == settings.train_answer_prompts
    assert sets["shown"] == len(settings.shown_prompts) == 3
    assert not any("shown" in name for name in json.loads((run / "scores.json").read_text()))
    assert "test_long_prompt" not in sets and "test_min_tokens" not in sets
    control = pd.DataFrame(splits.read_jsonl(paths.run("baseline", 0) / "generations.jsonl"))
    assert {"test_long_prompt", "test_min_tokens"} <= set(control.set)
    assert (control[control.set == "test_min_tokens"].n_tokens == settings.max_new_tokens).all()
    penalised = control[(control.set == "test") & (control.decoding != "greedy")]
    limits = penalised.set_index("example_id").n_tokens
    cut = [row for row in rows if row["set"] == "test_cut"]
    assert len(cut) == settings.answer_prompts
    assert all(row["n_tokens"] <= limits[row["example_id"]] for row in cut)
    perturbed = pd.read_csv(run / "perturbed_losses.csv")
    assert set(perturbed.kind) == {"none", "weights", "prompt"}
    assert perturbed.example_id.nunique() == settings.stability_rows
    assert len(pd.read_csv(run / "stopping.csv")) == settings.stability_rows
    items = pd.read_csv(run / "task_items.csv")
    assert items.groupby("task").size().tolist() == [settings.verifiable_per_family] * 3
    assert pd.read_csv(paths.run("neft_a15", 1) / "task_items.csv").empty


def test_evaluation_from_files_alone(profile, paths):
    """Every run's files have their columns, and the tables follow from them."""
    for arm, seed in profile.runs():
        finetune(profile, arm, seed, paths, silent)
    for arm, seed in [("base", 0), *profile.runs()]:
        tasks.evaluate(profile, arm, seed, paths, silent)
    run = paths.run("neft_a15", 0)
    losses = pd.read_csv(run / "losses.csv")
    assert (losses.nll > 0).all()
    rows = splits.read_jsonl(run / "generations.jsonl")
    columns = ["set", "example_id", "decoding", "n_tokens", "stopped", "text"]
    assert all(list(row) == columns for row in rows)
    assert {row["decoding"] for row in rows} == {"greedy_penalty_1.2", "greedy"}
    prompts = {row["prompt"] for row in splits.load_split(paths.processed, "test")}
    assert not prompts & {row["text"] for row in rows}
    for name, columns in tasks.ITEM_COLUMNS.items():
        assert list(pd.read_csv(run / name).columns) == columns
    _check_secondary(profile, paths, rows)

    found = Results(paths.results, profile)
    runs = found.runs
    contrasts = tables.contrasts(runs, found.seeds, profile, found.decoding)
    frames = {"main": found.main, "contrasts": contrasts}
    claims.write_tables(paths, frames, found.ledger.values(), found.caveats)
    expected = pd.concat(
        runs["neft_a15", s]["losses"].query("split == 'test'").set_index("example_id").nll
        - runs["baseline", s]["losses"].query("split == 'test'").set_index("example_id").nll
        for s in (0, 1)
    ).mean()
    ledger = {row["id"]: row for row in json.loads((paths.results / "claims.json").read_text())}
    assert ledger["confirmatory"]["estimate"] == pytest.approx(expected, abs=1e-12)
    assert list(ledger) == LEDGER
    assert all(row["verdict"] and row["paper"] and row["note"] for row in ledger.values())
    assert ledger["better_answers"]["verdict"] == (
        "not testable here (see profile llama2-7b-alpaca-full)"
    )
    assert ledger["few_lines"]["estimate"] == 3
    main = pd.read_csv(paths.tables / "main.csv")
    assert main.arm.tolist() == ["base", "baseline", "neft_a15"]
    assert main.n_seeds.tolist() == [1, 2, 2]
    by_hand = [runs["baseline", s]["losses"].query("split == 'test'").nll.mean() for s in (0, 1)]
    assert main.set_index("arm").test_nll["baseline"] == pytest.approx(sum(by_hand) / 2)
    assert math.isnan(main.set_index("arm").test_nll_ci_low["base"])
    assert contrasts.set_index("metric").loc["test_nll", "n_seeds"] == 2


def test_throughput_counts_what_the_docstring_says(profile):
    import types

    recipe = profile.train
    model = lora_model(load_base(profile.model), recipe, 0)
    mask = [0] * 10 + [1] * 10
    encoded = [{"input_ids": [5] * 20, "completion_mask": mask}] * 4
    one = run_log.throughput(model, recipe, encoded, seconds=1.0)
    assert one["tokens_per_second"] == 80 * recipe.epochs == one["padded_tokens_per_second"]
    count = types.SimpleNamespace(**parameter_counts(model))
    body = count.frozen - count.head  # nano ties its head to the embedding
    flops = recipe.epochs * (80 * (4 * body + 6 * count.trainable) + 40 * 4 * count.head)
    assert one["model_gflops_per_second"] == pytest.approx(flops / 1e9, abs=0.01)
