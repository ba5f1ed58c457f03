"""Models and data sets of the Hugging Face hub: a pinned commit becomes a local folder.

A repository on the hub can change; a commit cannot. What is here once is not asked for again,
so that a second run needs no network, and `HF_HUB_OFFLINE=1` is honoured.
"""

import re
from pathlib import Path

from neft_utils.base.strict import ConfigError

# Weights in other formats than the one that is read.
UNUSED = ["*.bin", "*.pth", "*.pt", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*"]
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def state(name, revision, key):
    """Whether a model repository is in the cache, as text; raises ConfigError for what is no id."""
    from huggingface_hub import errors, snapshot_download

    _check(name, revision, key)
    try:
        snapshot_download(name, revision=revision, ignore_patterns=UNUSED, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return "to be downloaded from the hub"
    return "in the cache"


def snapshot(name, revision, key, kind="model"):
    """Folder with the files of a hub repository at a commit, downloaded when missing.

    name: owner/name; revision: the commit's 40 hex digits; key: the profile's key that gave the
    name, for messages; kind: "model" or "dataset". Raises ConfigError of one line for what is no
    such name, a revision that is missing or unknown, a gate, and a hub that cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    part = _check(name, revision, key)
    try:
        return Path(
            snapshot_download(name, revision=revision, repo_type=kind, ignore_patterns=UNUSED)
        )
    except errors.GatedRepoError:
        remedy = "accept its conditions on the hub and set HF_TOKEN, or name an ungated copy"
        raise ConfigError(f"{key}: {name} is gated: {remedy}") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{part}.revision: {name} has no commit {revision}") from None
    except errors.RepositoryNotFoundError:
        remedy = "correct the id, or set HF_TOKEN if it is private"
        raise ConfigError(f"{key}: the hub has no {name}: {remedy}") from None
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        remedy = "go online once, or give a local folder"
        raise ConfigError(f"{key}: {name} is not in the cache and {reason}: {remedy}") from None
    except OSError as error:  # a full disk, a broken connection
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{key}: cannot get {name} ({reason}): run the command again") from None


def _check(name, revision, key):
    """The profile's part that the key is in; ConfigError for a name or revision that cannot be."""
    part = key.rpartition(".")[0]
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(f"{key}: {name} is neither a folder nor a hub id (owner/name)")
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ConfigError(
            f"{part}.revision: pin a commit of {name} on the hub, 40 hex digits, not {revision!r}"
        )
    return part
