"""The books of scoring one run: what it was scored with, its phases' seconds, its files."""

import contextlib
import time

import pandas as pd

from neft_utils.base.files import read_json, sha256_file, write_csv, write_json, write_jsonl
from neft_utils.base.keys import step_key
from neft_utils.base.paths import BASE
from neft_utils.base.profiles import as_dict
from neft_utils.base.provenance import begin, describe
from neft_utils.base.strict import ConfigError
from neft_utils.evaluate import alpaca_eval, benchmarks, judge, reward, stability, text_metrics
from neft_utils.train.folders import weights_file
from neft_utils.train.memory import out_of_memory

# Per-item files of a run; one that was not asked for has its columns and no row.
ITEM_COLUMNS = {
    "losses.csv": ["split", "example_id", "n_tokens", "nll", "end_nll"],
    "task_items.csv": benchmarks.COLUMNS,
    "perturbed_losses.csv": stability.PERTURBED_COLUMNS,
    "stopping.csv": stability.STOPPING_COLUMNS,
    "preferences.csv": ["set", *judge.COLUMNS],
    "rewards.csv": reward.COLUMNS,
}


class Scoring:
    """Keeps the books while a run, or the untrained base (arm "base", seed 0), is scored.

    folder: the run's. From here until `finish` the run does not count as scored. Raises
    ConfigError for a run that is not trained, or was trained on other base weights.
    """

    def __init__(self, profile, arm, seed, paths):
        profile.check_run(arm, seed)
        self.profile, self.arm, self.seed = profile, arm, seed
        self.folder = paths.run(arm, seed)
        self.begun, self.key = begin(), step_key(profile, 4, arm, seed)
        self.seconds, self.written = {}, set()
        trained = read_json(self.folder / "provenance.json")
        if arm != BASE and trained is None:
            raise ConfigError(
                f"run {self.folder.name} is not trained: run notebook 03 with ARM {arm} and SEED"
                f" {seed} first"
            )
        self.base_sha256 = sha256_file(weights_file(profile.model))
        if arm != BASE and trained["base_sha256"] != self.base_sha256:
            raise ConfigError(
                f"run {self.folder.name} was trained on other base weights: run notebook 03 again"
            )
        (self.folder / "scores.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def phase(self, name, setting):
        """Count the seconds of the block to a phase; setting: of the profile's evaluate section,
        the one to lower if memory runs out (MemoryError of one line)."""
        started = time.perf_counter()
        with out_of_memory(f"evaluate.{setting}", getattr(self.profile.evaluate, setting)):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def write(self, name, table):
        """Write a DataFrame as one of the files in ITEM_COLUMNS, with those columns."""
        write_csv(self.folder / name, table.reindex(columns=ITEM_COLUMNS[name]))
        self.written.add(name)

    def write_answers(self, rows):
        """Write generations.jsonl: ids and the model's answers, never a prompt's text."""
        write_jsonl(self.folder / "generations.jsonl", rows)

    def finish(self, scores, answers, engine):
        """Write what was not asked for as empty files and, last, scores.json.

        scores: {name: number}, NaN becomes null; answers: rows of generations.jsonl; engine: what
        answered. For the base also config.json and provenance.json.
        """
        for name in ITEM_COLUMNS.keys() - self.written:
            self.write(name, pd.DataFrame())
        about = describe(
            self.begun,
            arm=self.arm,
            seed=self.seed,
            step_key=self.key,
            answer_engine=engine,
            phase_seconds={name: round(value, 1) for name, value in self.seconds.items()},
            answer_tokens=sum(row["n_tokens"] for row in answers if row["set"] == "test"),
            base_sha256=self.base_sha256,
        )
        if self.arm == BASE:
            model = as_dict(self.profile.model)
            config = {"profile": self.profile.name, "arm": self.arm, "seed": self.seed}
            write_json(self.folder / "config.json", config | {"model": model})
            write_json(self.folder / "provenance.json", about)
        scores = {name: None if value != value else value for name, value in scores.items()}
        write_json(self.folder / "scores.json", {**scores, "provenance": about})


def answer_scores(rows, references, chunk):
    """{"<decoding>/<name>": value} of the test answers; other sets have their name in front.

    rows: of generations.jsonl; references: {example_id: text}; chunk: words, see
    `text_metrics.two_gram_repetition`. Answers to the shown prompts are there to be read, three of
    them say nothing as a number.
    """
    scores, rows = {}, [row for row in rows if row["set"] != "shown"]
    if rows:
        for (name, decoding), group in pd.DataFrame(rows).groupby(["set", "decoding"]):
            known = None if name in ("verifiable", alpaca_eval.SET) else references
            summary = text_metrics.summarise_answers(group, known, chunk)
            front = decoding if name == "test" else f"{name}/{decoding}"
            scores |= {f"{front}/{key}": value for key, value in summary.items()}
    return scores
