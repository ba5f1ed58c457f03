"""The rows of a profile without writing any, as notebook 01 makes them, for `make check`."""

from neft_utils.data import sources, splits
from neft_utils.data.special_tokens import spells_no_special_token
from neft_utils.train.encoding import count_tokens, encode

SHOWN = 1200  # characters of the example's prompt and of its answer


def rows_of(
    config,
    seeds,
    count_tokens,
    keeps=lambda row: True,
    sharegpt_json=None,
    mtbench_questions=None,
    mtbench_references=None,
):
    """(splits, manifest) of a data section, as notebook 01 makes them; nothing is written.

    config: profiles.Data; seeds: one training subset each; count_tokens: see `splits.count`;
    keeps: `special_tokens.spells_no_special_token` of the model's tokenizer.
    ShareGPT and MT-Bench come as paths of their files (`sources.source_files`). Raises DataError.
    """
    mtbench = mtbench_questions, mtbench_references
    ood = sources.mtbench_rows(*mtbench, config) if config.ood_rows else []
    steps, rows, hashes = sources.load_source(config, sharegpt_json)
    if ood:
        hashes |= sources.hashes_of(*mtbench)
        splits.count(ood, count_tokens)
    funnel = splits.Funnel(steps, rows)
    funnel.keep("no special token spelled out", keeps)
    for _ in splits.sieve(funnel, config, count_tokens, ood):
        pass
    made = splits.split(funnel.rows, config) | {"ood": ood[: config.ood_rows]}
    made |= {f"train-s{seed}": splits.draw(made["pool"], config, seed) for seed in seeds}
    return made, splits.describe(config, seeds, funnel, made, hashes)


def check_rows(profile, tokenizer):
    """Lines of text about a profile's rows: what each filter drops, the splits, and an example.

    Raises DataError. Nothing is written besides wheels that are missing.
    """
    config, seeds = profile.data, profile.all_seeds()
    files = sources.source_files(config)
    keeps = spells_no_special_token(tokenizer)
    made, manifest = rows_of(config, seeds, count_tokens(tokenizer), keeps, **files)
    first, *steps = manifest["funnel"]
    yield f"source: {first['rows']:,} {first['step']}"
    yield from (f"  {remark}" for remark in first.get("remarks", ()))
    left = first["rows"]
    for step in steps:
        yield f"  {step['step']:<48} drops {left - step['rows']:>6,}"
        left = step["rows"]
    yield "rows: " + ", ".join(f"{name} {len(rows)}" for name, rows in made.items())
    row = made["pool"][0]
    ids, mask = encode(tokenizer, row).values()
    begin = mask.index(1)
    yield f"row {row['id']!r} as the model reads it, up to where the loss begins:"
    yield _indented(tokenizer.decode(ids[:begin]))
    yield "and what the loss is taken of:"
    yield _indented(tokenizer.decode(ids[begin:]))


def _indented(text):
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"
    return "\n".join(f"    {line}" for line in text.splitlines())
