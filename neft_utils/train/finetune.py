"""One fine-tuning run."""

import shutil
import time
import warnings

import pandas as pd
import torch

from neft_utils.base.files import sha256_file, write_csv, write_json
from neft_utils.base.keys import step_key
from neft_utils.base.profiles import as_dict
from neft_utils.base.provenance import begin, describe
from neft_utils.data import splits
from neft_utils.data.splits import train_rows
from neft_utils.noise import NEFTuneCallback
from neft_utils.train.base_models import load_base, load_tokenizer, require_device
from neft_utils.train.encoding import encode
from neft_utils.train.folders import weights_file
from neft_utils.train.losses import out_of_memory
from neft_utils.train.run_log import LOG_COLUMNS, RunLog, last_checkpoint, throughput
from neft_utils.train.trainer import build_trainer, trainable


def finetune(profile, arm, seed, paths, say=print):
    """Train one run and write its folder; returns the run's folder.

    Writes config.json, train_log.csv (LOG_COLUMNS; row 0 is before training), noise.json,
    adapter/ (or model/, where all weights are trained) and, last, provenance.json, so that a
    folder with it is a whole run.
    """
    profile.check_run(arm, seed)
    require_device(profile)
    begun, key = begin(), step_key(profile, 3, arm, seed)
    recipe, change, run = profile.recipe(arm), profile.arms[arm], paths.run(arm, seed)
    for old in ("provenance.json", "scores.json"):  # of an earlier run: this one is not whole yet
        (run / old).unlink(missing_ok=True)
    tokenizer = load_tokenizer(profile.model)
    encoded = [encode(tokenizer, row) for row in train_rows(profile, arm, seed, paths)]
    validation = [
        encode(tokenizer, row) for row in splits.load_split(paths.processed, "validation")
    ]
    model = trainable(load_base(profile.model), recipe, seed)
    callback = NEFTuneCallback(
        change.noise_alpha,
        distribution=change.distribution,
        length=change.length,
        where=change.where,
    )
    mean_tokens = sum(len(e["input_ids"]) for e in encoded) / len(encoded)

    def tokens_of_step(step):
        return round(min(step * recipe.batch_size, len(encoded) * recipe.epochs) * mean_tokens)

    log = RunLog(model, tokens_of_step, validation, profile.evaluate.batch_tokens, say)
    folder = run / "trainer" / key[:16]  # a checkpoint of other code or settings is no beginning
    trainer = build_trainer(model, tokenizer, encoded, recipe, seed, [callback, log], folder)
    checkpoint = last_checkpoint(folder, log)
    with (
        warnings.catch_warnings(),
        out_of_memory("train.micro_batch_tokens", recipe.micro_batch_tokens),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of TRL at transformers, not ours
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    seconds = time.perf_counter() - log.started - log.scoring
    write_json(
        run / "config.json",
        {
            "profile": profile.name,
            "arm": arm,
            "seed": seed,
            "model": as_dict(profile.model),
            "noise": as_dict(change),
            "train": as_dict(recipe),
            "step_key": key,
        },
    )
    write_csv(run / "train_log.csv", pd.DataFrame(log.rows).reindex(columns=LOG_COLUMNS))
    resumed = {"from_step": int(checkpoint.name.split("-")[1])} if checkpoint else {}
    write_json(run / "noise.json", callback.report() | resumed)
    whole, weights = recipe.method == "full", run / profile.weights
    (model.to(torch.bfloat16) if whole else model).save_pretrained(
        weights.parent, max_shard_size="1TB"
    )
    tokens = round(mean_tokens * len(encoded)) * recipe.epochs
    write_json(
        run / "provenance.json",
        describe(
            begun,
            arm=arm,
            seed=seed,
            train_seconds=round(seconds, 1),
            train_tokens=tokens,
            **throughput(model, recipe, encoded, seconds),
            adapter_sha256=sha256_file(weights),
            data_sha256=sha256_file(paths.processed / f"train-s{seed}.jsonl"),
            base_sha256=sha256_file(weights_file(profile.model)),
        ),
    )
    shutil.rmtree(run / "trainer", ignore_errors=True)
    return run
