"""`make profile`: the beginning of a profile of one's own, with sizes that fit the rows."""

import dataclasses
import json
import shlex
import tempfile
from pathlib import Path

import numpy as np

from neft_utils.base.files import atomic_write_text
from neft_utils.base.paths import find
from neft_utils.base.profiles import Data, Model
from neft_utils.base.read_profile import check_name, load_profile
from neft_utils.base.strict import ConfigError
from neft_utils.data.sources import DataError, source_files
from neft_utils.data.special_tokens import spells_no_special_token
from neft_utils.data.splits import total_tokens
from neft_utils.make.rows import rows_of

LONGEST = 1024  # tokens of a row, unless the user asks for more: memory grows with it
FEWEST = 10  # usable rows
HEAD = """\
# {name}, begun by `make profile`. What is not named here is as in profile {base}.
# Look before you run: make check PROFILE={file}, make plan PROFILE={file}
# Then: make reproduce PROFILE={file}
extends: {base}
"""
TAIL = """\
# What is often changed as well, as it is in {base}:
# train: {{learning_rate: {train.learning_rate:g}, epochs: {train.epochs}, batch_size: \
{train.batch_size}}}
# seeds: {seeds}
# arms:
#   prompt_only: {{noise_alpha: {alpha:g}, where: prompt}}  # one more arm
#   {arm}: null  # takes this arm away
# memory_gb: {memory:g}  # of one run; what your model needs depends on its size
"""


def write_profile(name, base, model=None, rows=None):
    """Write NAME.yaml in the working directory; returns a sentence that says what to do next.

    base: name or path of the profile that it extends. model: a folder, or a hub id with its
    commit, owner/name@commit. rows: a file or folder. Raises ConfigError and DataError.
    """
    file = Path(f"{name}.yaml")
    if not name or file.name != str(file):
        raise ConfigError(
            f"NAME={name}: give a name, no path: make profile NAME=mine ROWS=rows.json"
        )
    check_name(file)
    if file.exists():
        raise ConfigError(f"{file} exists: delete it, or give another NAME")
    under = load_profile(base)
    text = [HEAD.format(name=name, base=base, file=shlex.quote(str(file)))]
    chosen = under.model
    if model:
        chosen = _model(model)
        text.append(_section("model", {"source": chosen.source, "revision": chosen.revision}))
        chosen = dataclasses.replace(chosen, source=_here(chosen.source))
    if rows:
        chosen = dataclasses.replace(chosen, base_weights=under.model.base_weights)
        text += _fitting(under, chosen, rows)
    pair = under.confirmatory
    others = [arm for arm in under.arms if arm not in (pair.treatment, pair.control)]
    arm = others[0] if others else "name_of_an_arm"
    about = {"train": under.train, "seeds": list(under.seeds), "memory": under.memory_gb}
    about["alpha"] = under.arms[pair.treatment].noise_alpha
    text.append(TAIL.format(base=base, arm=arm, **about))
    with tempfile.TemporaryDirectory() as folder:  # nothing is left that could not be read
        draft = Path(folder) / file
        draft.write_text("".join(text), "utf-8")
        load_profile(draft)
    atomic_write_text(file, "".join(text))
    return f"{file} written: look at it, then make check PROFILE={shlex.quote(str(file))}"


def _here(path):
    """The path as the new profile will find it, which lies in the working directory."""
    found = find(path, Path.cwd())
    return path if found is None else str(found)


def _model(text):
    source, _, revision = text.partition("@") if not Path(text).is_dir() else (text, "", "")
    return Model(source=source, revision=revision or None)


def _fitting(under, model, path):
    """The sections data and evaluate for rows at a path, as text."""
    from neft_utils.train.base_models import load_tokenizer  # here: it loads torch, in seconds
    from neft_utils.train.encoding import count_tokens

    tokenizer = load_tokenizer(model)
    reads = count_tokens(tokenizer), spells_no_special_token(tokenizer)
    kind = "json" if Path(path).suffix.lower() in (".json", ".jsonl") else "alpaca"
    few = {"train_rows": 1, "validation_rows": 1, "test_rows": 1}
    asked = Data(
        source=kind, path=_here(path), max_tokens=2**30, ood_rows=under.data.ood_rows, **few
    )
    files = source_files(asked)
    made, _ = rows_of(asked, [0], *reads, **files)
    lengths = sorted(
        total_tokens(row) for name in ("pool", "validation", "test") for row in made[name]
    )
    fits = -(-int(np.quantile(lengths, 0.95, method="higher")) // 32) * 32  # rounded up
    longest = max(32, min(LONGEST, fits))
    usable = sum(length <= longest for length in lengths)
    if usable < FEWEST:
        raise DataError(
            f"{path}: {usable} usable rows of at most {longest} tokens; wanted: {FEWEST}"
        )
    for share in (1, 0.8, 0.6, 0.4, 0.2):  # groups of similar rows stay together, so try
        sizes = {
            "test_rows": max(1, min(under.data.test_rows, int(0.2 * share * usable))),
            "validation_rows": max(1, min(under.data.validation_rows, int(0.1 * share * usable))),
            "train_rows": max(1, min(under.data.train_rows, int(0.6 * share * usable))),
        }
        try:
            rows_of(dataclasses.replace(asked, max_tokens=longest, **sizes), [0], *reads, **files)
            break
        except DataError:
            if share == 0.2:
                raise
    said = f"{len(lengths)} rows, median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}"
    data = {"source": kind, "path": path, "max_tokens": longest, **sizes}
    wanted = {
        "answer_prompts": min(under.evaluate.answer_prompts, sizes["test_rows"]),
        "verifiable_per_family": min(under.evaluate.verifiable_per_family, sizes["test_rows"] // 3),
        "stability_rows": min(under.evaluate.stability_rows, sizes["test_rows"]),
    }
    return [f"# {said}\n", _section("data", data), _section("evaluate", wanted)]


def _section(name, values):
    """A section as YAML; JSON's quoted texts are YAML's."""
    lines = [
        f"  {key}: {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None
    ]
    return f"{name}:\n{''.join(lines)}"
