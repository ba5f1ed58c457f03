"""A run's books: what made it, its checkpoints, and the files that say it is whole."""

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from neft_utils.base.files import sha256_file, write_csv, write_json
from neft_utils.base.keys import step_key
from neft_utils.base.profiles import as_dict
from neft_utils.base.provenance import begin, describe
from neft_utils.noise import NEFTuneCallback
from neft_utils.train.folders import weights_file
from neft_utils.train.memory import out_of_memory
from neft_utils.train.run_log import CURVE_COLUMNS, LOG_COLUMNS, RunLog, last_checkpoint, throughput

OTHER = "checkpoints of other code, settings or rows are here: training starts anew"


@dataclass
class Run:
    """A run in the making: its folder, the checkpoint to go on from, and where weights go.

    checkpoint: path as text, or None to start from the beginning. weights: the file that has to be
    there when the context ends.
    """

    folder: Path
    weights: Path
    checkpoint: str | None


@contextlib.contextmanager
def recorded(trainer, profile, arm, seed, paths, say=print):
    """Keep the books of one run while it trains and saves; yields a Run.

    trainer: not yet trained, with a RunLog and a NEFTuneCallback among its callbacks. Inside, call
    `trainer.train(resume_from_checkpoint=run.checkpoint)` and save into `run.weights.parent`. A
    checkpoint is only gone on from if code, settings and rows are those that made it; else it is
    deleted. At the end train_log.csv (LOG_COLUMNS; row 0 is before training), losses_by_epoch.csv
    (CURVE_COLUMNS), config.json, noise.json and, last, provenance.json are written: a folder with
    it is a whole run.
    Raises RuntimeError for a trainer that has trained, or where nothing was saved; MemoryError of
    one line that names the setting to lower.
    """
    profile.check_run(arm, seed)
    begun, key = begin(), step_key(profile, 3, arm, seed)
    log, noise = (_callback(trainer, kind) for kind in (RunLog, NEFTuneCallback))
    run = Run(paths.run(arm, seed), paths.run(arm, seed) / profile.weights, None)
    run.checkpoint = _checkpoint(trainer, log, noise, key, say)
    if trainer.state.global_step and run.checkpoint is None:
        raise RuntimeError(
            "this trainer has trained already, so its model is no beginning: run the notebook"
            " again from the cell that loads the model"
        )
    for old in ("provenance.json", "scores.json"):  # of an earlier run: this one is not whole yet
        (run.folder / old).unlink(missing_ok=True)
    with out_of_memory("train.micro_batch_tokens", trainer.micro_batch_tokens):
        yield run
    if not run.weights.exists():
        raise RuntimeError(f"{run.weights} is missing: save the model inside the `with` block")
    _write(trainer, log, noise, profile, arm, seed, paths, run, begun, key)
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def _callback(trainer, kind):
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, kind)]
    if len(found) != 1:
        raise RuntimeError(f"the trainer needs one {kind.__name__}, it has {len(found)}")
    return found[0]


def _checkpoint(trainer, log, noise, key, say):
    """The newest whole checkpoint that these very settings made, as text; else None."""
    folder = Path(trainer.args.output_dir)
    made_by, known = folder / "made_by", _fingerprint(trainer, log, noise, key)
    if made_by.exists() and made_by.read_text("utf-8") == known:
        found = last_checkpoint(folder, log)
        return None if found is None else str(found)
    if list(folder.glob("checkpoint-*")):
        say(OTHER)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_by.write_text(known, "utf-8")
    return None


def _fingerprint(trainer, log, noise, key):
    """sha256 of what a checkpoint depends on: the saved notebook's key, and what its cells made.

    In Jupyter a changed cell may not be saved yet, so the trainer itself is asked too.
    """
    arguments = trainer.args.to_dict()
    places = ("output_dir", "logging_dir", "run_name")
    settings = {name: value for name, value in arguments.items() if name not in places}
    adapters = getattr(trainer.model, "peft_config", {})
    adapters = {name: one.to_dict() for name, one in adapters.items()}
    parts = [key, settings, adapters, noise.options, trainer.micro_batch_tokens, log.train]
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(value)


def _write(trainer, log, noise, profile, arm, seed, paths, run, begun, key):
    recipe = profile.recipe(arm)
    seconds = time.perf_counter() - log.started - log.scoring
    described = {
        "profile": profile.name,
        "arm": arm,
        "seed": seed,
        "model": as_dict(profile.model),
        "noise": as_dict(profile.arms[arm]),
        "train": as_dict(recipe),
        "step_key": key,
    }
    write_json(run.folder / "config.json", described)
    write_csv(run.folder / "train_log.csv", pd.DataFrame(log.rows).reindex(columns=LOG_COLUMNS))
    curve = pd.DataFrame(log.curve, columns=CURVE_COLUMNS)
    write_csv(run.folder / "losses_by_epoch.csv", curve)
    resumed = {"from_step": int(run.checkpoint.rpartition("-")[2])} if run.checkpoint else {}
    write_json(run.folder / "noise.json", noise.report() | resumed)
    about = describe(
        begun,
        arm=arm,
        seed=seed,
        train_seconds=round(seconds, 1),
        train_tokens=log.tokens_of_step(trainer.state.max_steps, trainer.args),
        **throughput(trainer.model, recipe, log.train, seconds),
        adapter_sha256=sha256_file(run.weights),
        data_sha256=sha256_file(paths.processed / f"train-s{seed}.jsonl"),
        base_sha256=sha256_file(weights_file(profile.model)),
    )
    write_json(run.folder / "provenance.json", about)
