"""What of a profile's values does not go together, each alone being allowed."""

from neft_utils.base.paths import BASE


def faults_between(profile, incomplete=False):
    """Messages on values that contradict each other, all of them, each with key and remedy.

    incomplete: whether some values were refused before; what depends on those is left out.
    """
    faults = []
    rules = _arms, _confirmatory, _seeds, _rows, _epochs, _method, _answers, _judge, _margins
    for check in rules:
        try:
            faults += check(profile)
        except (TypeError, AttributeError, KeyError):  # of a value that is UNKNOWN
            if not incomplete:
                raise
    return faults


def _arms(profile):
    if not profile.arms or BASE in profile.arms:
        yield f"arms must name at least one arm, and none may be {BASE!r}"
    for name, arm in profile.arms.items():
        if arm.control is not None and arm.control not in profile.arms:
            yield f"arms.{name}.control: {arm.control!r} is no arm: use {', '.join(profile.arms)}"


def _confirmatory(profile):
    pair, known = profile.confirmatory, True
    for role in ("treatment", "control"):
        arm = getattr(pair, role)
        if isinstance(arm, str) and arm not in profile.arms:
            known = False
            yield f"confirmatory.{role}: {arm!r} is no arm: use {', '.join(profile.arms)}"
    if pair.treatment == pair.control:
        yield f"confirmatory: treatment and control are both {pair.control}"
    elif known and profile.seeds:
        shared = set(profile.seeds_of(pair.treatment)) & set(profile.seeds_of(pair.control))
        if not shared:
            yield (
                f"confirmatory: {pair.treatment} and {pair.control} share no seed, so nothing can"
                " be paired"
            )


def _seeds(profile):
    if not len(profile.seeds):
        yield "seeds must name at least one seed"
    have = profile.all_seeds()
    for name in ("answer_seeds", "secondary_seeds"):
        if unknown := sorted(set(getattr(profile.evaluate, name) or ()) - set(have)):
            use = ", ".join(map(str, have)) or "those of arms"
            yield f"evaluate.{name}: no run has seed {unknown[0]}: use {use}"


def _rows(profile):
    data, asked = profile.data, profile.evaluate
    if data.source in ("json", "alpaca") and not data.path:
        yield f"data.path: source {data.source} needs `path`: set it in the profile, under data"
    needed = 3 * asked.verifiable_per_family  # a prompt of its own for each
    if needed > data.test_rows:
        yield (
            f"evaluate.verifiable_per_family: {asked.verifiable_per_family} needs {needed} test"
            f" rows, data.test_rows is {data.test_rows}: use {data.test_rows // 3}"
        )
    for name, arm in profile.arms.items():
        if arm.data_fraction * data.train_rows < 0.5:
            yield (
                f"arms.{name}.data_fraction: {arm.data_fraction:g} of data.train_rows"
                f" {data.train_rows} is no row"
            )


def _epochs(profile):
    every = profile.train.validate_epochs
    for name in profile.arms:
        if every > (epochs := profile.recipe(name).epochs):
            yield (
                f"train.validate_epochs: {every} is longer than the {epochs} epochs of arm {name}:"
                f" use {epochs} or less"
            )
            break


def _method(profile):
    form = profile.model.base_weights
    if profile.train.method == "full" and form != "bf16":
        yield (
            "train.method: full trains every weight, which a 4-bit base has rounded away: use"
            " base_weights bf16"
        )
    if profile.evaluate.stability_rows and form == "nf4":
        yield (
            f"evaluate.stability_rows: {profile.evaluate.stability_rows} needs weights that can be"
            " changed and restored: use base_weights nf4_dequantized or bf16, or 0"
        )


def _answers(profile):
    asked = profile.evaluate
    if asked.answer_prompts_without_penalty and asked.repetition_penalty == 1:
        yield (
            "evaluate.answer_prompts_without_penalty: with repetition_penalty 1 all prompts are"
            " answered without: use 0"
        )
    if any(not prompt.strip() for prompt in asked.shown_prompts):
        yield "evaluate.shown_prompts: a prompt must not be empty"


def _judge(profile):
    judge = profile.evaluate.judge
    if judge is not None and (judge.model is None) == (judge.reward_model is None):
        yield (
            "evaluate.judge: needs either model, which an endpoint answers for, or reward_model,"
            " which scores here"
        )


def _margins(profile):
    for name, margin in profile.margins.items():
        if margin <= 0:
            yield f"margins.{name}: {margin:g} must be positive"
