"""The rows of a profile without writing any: notebook 01's steps in a row, for `make check`."""

from neft_utils.data import sources, splits


def rows_of(
    config,
    seeds,
    count_tokens,
    sharegpt_json=None,
    mtbench_questions=None,
    mtbench_references=None,
):
    """(splits, manifest) of a data section, as notebook 01 makes them; nothing is written.

    config: profiles.Data; seeds: one training subset each; count_tokens: see `splits.count`.
    ShareGPT and MT-Bench come as paths of their files (`sources.source_files`). Raises DataError.
    """
    mtbench = mtbench_questions, mtbench_references
    ood = sources.mtbench_rows(*mtbench, config) if config.ood_rows else []
    what, rows, hashes = sources.load_source(config, sharegpt_json)
    funnel = splits.Funnel(what, rows)
    for name, keeps in splits.text_filters(config).items():
        funnel.keep(name, keeps)
    splits.count(funnel.rows, count_tokens)
    splits.count(ood, count_tokens)
    for name, keeps in splits.length_filters(config).items():
        funnel.keep(name, keeps)
    name, kept = splits.find_copies(funnel.rows, config.source)
    funnel.keep(name, lambda row: row["id"] in kept)
    if ood:
        hashes |= sources.hashes_of(*mtbench)
        funnel.keep("no evaluation prompt inside", splits.holds_no(ood))
    made = splits.split(funnel.rows, config) | {"ood": ood[: config.ood_rows]}
    made |= {f"train-s{seed}": splits.draw(made["pool"], config, seed) for seed in seeds}
    return made, splits.describe(config, seeds, funnel, made, hashes)
