"""The tests that need a card, all of them in one command, and what came of them as a file."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from neft_utils.base.files import CODE, ROOT, write_json

RESULT = "gpu-tests.json"
KINDS = ("tests", "failures", "errors", "skipped")
MARK = "pytest.mark.gpu"


def gpu_tests(out):
    """Run the tests marked gpu; returns pytest's exit code and writes RESULT below `out`.

    The file has the numbers of passed, failed and skipped tests, the names of those that failed,
    and card, versions and commit. Raises FileNotFoundError where there are no tests.
    """
    from neft_utils.base.provenance import describe

    files = marked(CODE / "tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rs", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-m", "gpu and not slow", f"--junitxml={report}"]
        done = subprocess.run([*command, *map(str, files)], cwd=CODE)
        if report.exists():
            facts = describe()
            facts = {key: facts[key] for key in ("commit", "dirty", "device", "versions")}
            write_json(ROOT / out / RESULT, {**counts(report), **facts})
    return done.returncode


def marked(folder):
    """Test files below a folder that hold a test marked gpu; FileNotFoundError without any."""
    found = [path for path in folder.rglob("test_*.py") if MARK in path.read_text("utf-8")]
    if not found:
        raise FileNotFoundError(2, "no tests that need a GPU", str(folder))
    return sorted(found)


def counts(report):
    """{"passed", "failed", "skipped", "names" of those that failed} of a JUnit XML file."""
    root = ElementTree.parse(report).getroot()
    number = {kind: sum(int(s.get(kind, 0)) for s in root.iter("testsuite")) for kind in KINDS}
    failed = number["failures"] + number["errors"]
    bad = [case for case in root.iter("testcase") if {c.tag for c in case} & {"failure", "error"}]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
        "names": [case.get("name") for case in bad],
    }
