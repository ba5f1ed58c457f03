"""`make plan`: arms, phases and minutes of a profile, and how many runs go side by side."""

import math

from neft_utils.base.estimate import estimate, measured_training
from neft_utils.base.plain import say
from neft_utils.make import preflight

# A small model's run waits for its kernels to be launched, not for the card: on an H100 nine side
# by side trained 9,600 tokens a second each, 86,000 together, and beside fewer neighbours one
# trained 13,000 (results/LOG.md). A large model fills the card. A model of 270 million weights, all
# of them trained, is a small one.
SMALL_GB, SMALL_RUNS = 16, 9


def workers(profile, asked=None):
    """How many runs go side by side: one a core, as memory allows.

    On a GPU as asked, else up to nine of a small model and one of a large.
    """
    if profile.device == "cuda":
        cards, need = preflight.gpus(), profile.gpu_memory_gb
        if asked is None and need <= SMALL_GB:
            asked = min(SMALL_RUNS, preflight.cores())
        # All on the first card; where no card is seen, `make plan` asks for another machine.
        room = (cards[0][1] // need if need else 1) if cards else math.inf
        asked = min(asked or 1, room)
    memory = preflight.memory_gb() // profile.memory_gb
    return int(max(1, min(asked or preflight.cores(), memory)))


def show_plan(profile, paths, side_by_side):
    """Print what the profile would do, and how long it would take."""
    say(f"profile {profile.name}: {' '.join(profile.description.split())}")
    say(
        f"model {profile.model.source} ({profile.model.base_weights}), data {profile.data.source},"
        f" {profile.data.train_rows} training rows a seed, {profile.train.epochs} epochs"
    )
    for arm, change in profile.arms.items():
        seeds = ", ".join(map(str, profile.seeds_of(arm)))
        say(f"  arm {arm}: noise_alpha {change.noise_alpha:g}, seeds {seeds}")
    say(f"{'phase':<28}{'steps':>6}{'tokens':>12}{'minutes of one worker':>24}")
    rows = estimate(profile, paths)
    for phase, steps, tokens, seconds in rows:
        say(f"{phase:<28}{steps:>6}{tokens:>12,.0f}{seconds / 60:>24.1f}")
    total = sum(row[3] for row in rows) / 60
    minutes = total / side_by_side
    time = f"{minutes:.0f} minutes" if minutes < 200 else f"{minutes / 60:.1f} hours"
    kind = "measured" if profile.speed.measured else "estimated, not measured"
    if found := measured_training(profile, paths):
        kind = f"training measured by make bench-gpu on {found[1]}, the others {kind}"
    gpu = f", {profile.gpu_memory_gb:g} GB of GPU memory" if profile.gpu_memory_gb else ""
    say(
        f"about {time} with {side_by_side} side by side (speeds {kind}); each run"
        f" {profile.memory_gb:g} GB of memory{gpu}; {profile.disk_gb:g} GB of disk"
    )
