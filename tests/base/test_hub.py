"""What the hub can answer, by huggingface_hub's own client against a hub on the loopback."""

import json
import os
import subprocess
import sys

import pytest
from loopback import COMMIT, GATED, PRIVATE, hub

from neft_utils.base.paths import PACKAGE

ASK = """
import json, sys
from neft_utils.base import hub
out = []
for name, revision, kind in json.load(sys.stdin):
    try:
        folder = hub.snapshot(name, revision, "model.source", kind)
        out.append(sorted(path.name for path in folder.iterdir()))
    except ValueError as error:
        out.append(str(error))
print(json.dumps(out))
"""


def ask(address, cache, *cases, **environment):
    """Names of the files that each (name, revision, kind) brings, or its error."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(cases),
        env={
            **os.environ,
            "PYTHONPATH": str(PACKAGE.parent),
            "HF_ENDPOINT": address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The same questions to a hub that is there, offline afterwards, and without any cache."""
    folder = tmp_path_factory.mktemp("hub")
    here = folder / "name"
    here.mkdir()
    (here / "config.json").write_text("{}")
    (here / "pytorch_model.bin").write_text("unused")
    good = ("owner/name", COMMIT, "model")
    cases = [
        good,
        ("owner/rows", COMMIT, "dataset"),
        (GATED, COMMIT, "model"),
        ("owner/name", "f" * 40, "model"),
        ("owner/other", COMMIT, "model"),
        (PRIVATE, COMMIT, "model"),
        ("owner/name", "main", "model"),
        ("owner/name", None, "model"),
        ("./not/there", COMMIT, "model"),
    ]
    with hub({("models", "owner/name"): here, ("datasets", "owner/rows"): here}) as (address, _):
        online = ask(address, folder / "cache", *cases)
        offline = ask(address, folder / "cache", good, HF_HUB_OFFLINE="1")
        nothing = ask(address, folder / "empty", good, HF_HUB_OFFLINE="1")
    unreachable = ask(address, folder / "empty", good)
    return {"online": online, "offline": offline, "nothing": nothing, "unreachable": unreachable}


def test_a_pinned_commit_comes_without_files_that_are_not_read(answers):
    assert answers["online"][0] == ["config.json"]
    assert "config.json" in answers["online"][1]


@pytest.mark.parametrize(
    "case, words",
    [
        (2, ["owner/gated is gated", "HF_TOKEN"]),
        (3, ["model.revision: owner/name has no commit ffff"]),
        (4, ["the hub has no owner/other", "correct the id"]),
        (5, ["the hub has no owner/private", "HF_TOKEN"]),
        (6, ["model.revision: pin a commit of owner/name", "not 'main'"]),
        (7, ["pin a commit of owner/name", "not None"]),
        (8, ["./not/there is neither a folder nor a hub id"]),
    ],
)
def test_each_refusal_is_one_line_with_the_remedy(answers, case, words):
    message = answers["online"][case]
    assert isinstance(message, str) and "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_in_the_cache_needs_no_network(answers):
    assert answers["offline"] == [["config.json"]]


def test_what_is_not_there_says_whether_offline_or_unreachable(answers):
    assert "not in the cache and HF_HUB_OFFLINE is set" in answers["nothing"][0]
    assert "not in the cache and the hub cannot be reached" in answers["unreachable"][0]
