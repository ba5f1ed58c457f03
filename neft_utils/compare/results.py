"""A folder of results as data: what its runs' files say, read once and computed when asked for.

Stored tables are for readers and other programs; here numbers, verdicts and caveats come from the
per-item files, so that results of an earlier version speak today's words.
"""

from functools import cached_property

from neft_utils.base.paths import BASE
from neft_utils.base.profiles import decoding_name
from neft_utils.base.read_profile import load_profile
from neft_utils.compare import claims, tables
from neft_utils.compare.planning import planned_effects
from neft_utils.compare.runs import caveats, load_runs


class Results:
    """Runs of a profile below a folder and what follows from them.

    folder: Path that holds runs/; profile: base.profiles.Profile, by default the one of the
    folder's name. What is read raises ConfigError for unreadable runs.
    """

    def __init__(self, folder, profile=None):
        self.folder = folder
        self.profile = profile or load_profile(folder.name)
        self.decoding = decoding_name(self.profile.evaluate.repetition_penalty)

    @cached_property
    def runs(self):
        """`runs.load_runs`, of the profile's runs."""
        return load_runs(self.folder / "runs", self.profile)

    @cached_property
    def seeds(self):
        """`tables.by_seed`."""
        return tables.by_seed(self.runs, self.decoding)

    def contrast(self, pair, metric):
        """`tables.contrast` of a `tables.Contrast` in a metric."""
        return tables.contrast(self.runs, self.seeds, pair, metric, self.decoding)

    @cached_property
    def ledger(self):
        """{claim: `claims.Finding`}, in the order of the ledger."""
        found = claims.ledger(self.runs, self.seeds, self.profile, self.decoding)
        return {one.id: one for one in found}

    @cached_property
    def caveats(self):
        """`runs.caveats`."""
        return caveats(self.profile, self.runs)

    @property
    def main(self):
        """`tables.main_table`."""
        return tables.main_table(self.seeds, [BASE, *self.profile.arms])

    def plan(self, metric):
        """`planning.planned_effects` of the confirmatory contrast in a metric of items."""
        pair = claims.confirmatory(self.profile)
        return planned_effects(tables.paired(self.runs, pair, metric, self.decoding))

    @property
    def primary(self):
        """The primary `claims.Finding`s, in the order of the ledger."""
        return [one for one in self.ledger.values() if one.primary]
