"""The queue for a card: cut in the middle or killed there, it keeps what is whole and goes on.

Its pieces are nano profiles on the CPU, by the same commands that a card runs.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from chains import command, copy_of_the_repository, neft, surroundings
from test_faults import kill_all, wait_until

from neft_utils.base.files import read_json, write_json
from neft_utils.base.paths import PROFILES
from neft_utils.base.strict import ConfigError
from neft_utils.make import gpu_pieces, gpu_queue, gpu_tests, preflight
from neft_utils.make.gpu_pieces import PIECES, Piece, look, pieces_named

HAS_CARD = shutil.which("nvidia-smi") is not None
# The notebooks' whole chain, but of each run only what makes it a run.
SMALL = {"answer_prompts": 2, "max_new_tokens": 4, "answer_batch_size": 4}


def small(tmp_path, name, seeds, **speed):
    values = yaml.safe_load((PROFILES / "nano.yaml").read_text("utf-8"))
    values |= {"seeds": seeds, "evaluate": SMALL}
    values["speed"] |= speed
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def queue(folder, minutes, *profiles, **how):
    names = " ".join(map(str, profiles))
    how |= {"timeout": 1800}
    return neft(folder, "gpu-queue", "--minutes", minutes, "--pieces", names, **how)


def whole(results, seconds=0):
    """{run: when its scores were written} of the runs that are whole: scored, notebook 4 executed.

    A step that is killed after its last file and before its notebook's is made again, and so is
    one that ended so shortly before that Snakemake has not noted it: seconds is how long ago
    notebook 4 must have ended.
    """
    scores, latest = results.glob("runs/*/scores.json"), time.time() - seconds
    notebooks = results.glob("notebooks/04_evaluate__*.ipynb")
    executed = {p.stem.partition("__")[2] for p in notebooks if p.stat().st_mtime <= latest}
    return {p.parent.name: p.stat().st_mtime_ns for p in scores if p.parent.name in executed}


def test_cut_and_killed_in_the_middle_it_goes_on(tmp_path):
    folder = copy_of_the_repository(tmp_path / "clone")
    mine = small(tmp_path, "mine", [0, 1, 2])
    huge = small(tmp_path, "huge", [0], notebook_start=9000.0)  # as if it took hours
    results = folder / "results" / "local" / "mine"

    # Time is over in the middle of the first piece; the second never fits.
    minutes, started = 70 / 60, time.monotonic()
    cut = queue(folder, minutes, mine, huge)
    assert cut.returncode == 0, cut.stdout + cut.stderr
    assert time.monotonic() - started < 60 * minutes + 60, cut.stdout  # Python's start and end
    assert "stopped, time is over; what is whole is kept" in cut.stdout
    plan, *_ = [line for line in cut.stdout.splitlines() if f" 1 {huge}: skipped" in line]
    assert "min at least" in plan
    assert f"missing: {huge}: 3 of 3 runs (base-s0, baseline-s0, neft_a15-s0)" in cut.stdout
    assert f"missing: {mine}: " in cut.stdout and "the same command goes on" in cut.stdout
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(mine) in str(p.info)]
    kept = whole(results, 10 + gpu_queue.STOPPING)

    # Killed, all of it, where the piece trains or scores, it has kept what was whole.
    process = subprocess.Popen(
        command("gpu-queue", "--minutes", "60", "--pieces", str(mine)),
        cwd="/",
        env=surroundings(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: set(whole(results, 5)) - set(kept), process, 1800)
    wait_until(lambda: list(results.glob("notebooks/.0[34]*")), process, 600)
    settled = whole(results, 5)
    kill_all(process.pid)
    process.wait()
    assert {run: whole(results).get(run) for run in kept | settled} == kept | settled
    kept |= settled
    assert 0 < len(kept) < 7

    # The next time it goes on, with what was whole as it was.
    done = queue(folder, 60, mine)
    assert done.returncode == 0 and "nothing is missing" in done.stdout, done.stdout + done.stderr
    now = whole(results)
    runs = {"base-s0", *(f"{arm}-s{n}" for arm in ("baseline", "neft_a15") for n in (0, 1, 2))}
    assert set(now) == runs and {run: now[run] for run in kept} == kept
    assert not list(results.glob("notebooks/.*.ipynb")) and (results / "claims.json").exists()

    # Weights are left behind on a rented card; runs without them are no less whole.
    shutil.rmtree(results / "runs" / "neft_a15-s0" / "adapter")
    last = queue(folder, 5, mine)
    assert "nothing is missing" in last.stdout and "-- " not in last.stdout
    # A run by other code is one that is missing.
    scores = results / "runs" / "neft_a15-s0" / "scores.json"
    changed = read_json(scores)
    changed["provenance"]["step_key"] = "another"
    write_json(scores, changed)
    again = queue(folder, 0.4, mine)
    assert f"missing: {mine}: 1 of 7 runs (neft_a15-s0)" in again.stdout


@pytest.mark.skipif(HAS_CARD, reason="is about a machine without a GPU")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "10"], "gpu-queue needs a CUDA GPU and nvidia-smi lists none"),
        (["--minutes", "soon"], "MINUTES must be how long the card is there, a number over 0"),
        (["--minutes", "0"], "MINUTES must be how long the card is there, a number over 0"),
        (["--minutes", "nan"], "MINUTES must be how long the card is there, a number over 0"),
        (["--minutes", "5", "--pieces", "gpu-big"], "gpu-big"),
    ],
)
def test_what_cannot_be_is_one_line(words, said, capsys):
    from neft_utils.make.commands import main

    assert main(["gpu-queue", *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def card(folder, monkeypatch, mib, name="NVIDIA H100 80GB HBM3"):
    """An nvidia-smi that lists one card, first on the path."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{name}, {mib}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(preflight, "memory_gb", lambda: 128.0)
    monkeypatch.setattr(preflight, "_disk", lambda profile: "enough")


def test_a_card_too_small_for_a_piece_is_said_of_that_piece(tmp_path, monkeypatch):
    card(tmp_path, monkeypatch, 8192)
    bench, qlora, full = (look(piece, str(tmp_path)) for piece in PIECES[1:4])
    assert bench.refused == "needs 24 GB of GPU memory, this card has 9"
    assert full.refused.startswith("profile gpu-full needs 14 GB of GPU memory, NVIDIA H100")
    assert qlora.refused == "" and qlora.missing.startswith("3 of 3 runs (base-s0, baseline-s0")


def test_no_library_of_bitsandbytes_for_this_cuda_is_said(tmp_path, monkeypatch):
    card(tmp_path, monkeypatch, 81559)
    folders = {name: tmp_path / name for name in ("torch", "bitsandbytes")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(preflight, "_folder_of", folders.get)
    (folders["torch"] / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    qlora = Piece("gpu-qlora", "profile")
    said = look(qlora, str(tmp_path)).refused
    assert said.startswith("bitsandbytes has no library for CUDA 13.0, torch's here (it has none)")
    library = folders["bitsandbytes"] / "libbitsandbytes_cuda128.so"
    library.touch()
    assert "(it has 128): install another" in look(qlora, str(tmp_path)).refused
    library.rename(library.with_name("libbitsandbytes_cuda132.so"))
    assert look(qlora, str(tmp_path)).refused == ""  # of the same major version
    full = look(Piece("gpu-full", "profile"), str(tmp_path))  # holds no 4-bit weights
    library.with_name("libbitsandbytes_cuda132.so").unlink()
    assert full.refused == look(Piece("gpu-full", "profile"), str(tmp_path)).refused == ""
    monkeypatch.setattr(preflight, "_folder_of", {"torch": folders["torch"]}.get)
    assert "is not installed: run make env" in look(qlora, str(tmp_path)).refused


def test_the_order_is_the_pieces_own_and_names_choose_among_them():
    assert [piece.name for piece in pieces_named([])] == [
        *("tests", "bench-gpu", "gpu-qlora", "gpu-full", "gpu-small", "gpu-ablations")
    ]
    chosen = pieces_named(["gpu-small", "bench-gpu", "/mine.yaml"])
    assert [(one.name, one.kind) for one in chosen] == [
        *(("gpu-small", "profile"), ("bench-gpu", "bench"), ("/mine.yaml", "profile"))
    ]


def test_the_bench_and_the_tests_are_done_when_their_files_say_so(tmp_path, monkeypatch):
    bench, tests = Piece("bench-gpu", "bench"), Piece("tests", "tests")
    rows = {"ours": {"real_tokens_per_second": {}}, "trl": {"skipped": "no time left"}}
    write_json(tmp_path / "bench-gpu.json", {"rows": rows})
    card(tmp_path, monkeypatch, 81559)
    state = look(bench, str(tmp_path))
    assert state.missing == "2 of 3 rows" and state.minutes == pytest.approx(2.8)
    rows |= {"trl": rows["ours"], "ours_small_card": rows["ours"]}
    write_json(tmp_path / "bench-gpu.json", {"rows": rows})
    assert look(bench, str(tmp_path)).missing == ""
    assert look(tests, str(tmp_path)).missing == "not run on this card"
    commit = gpu_pieces.git_state()["commit"]
    ran = {"device": "NVIDIA H100 80GB HBM3", "commit": commit, "failed": 0, "names": []}
    write_json(tmp_path / gpu_tests.RESULT, ran)
    assert look(tests, str(tmp_path)).missing == ""
    write_json(tmp_path / gpu_tests.RESULT, ran | {"failed": 1, "names": ["test_a"]})
    state = look(tests, str(tmp_path))
    assert (state.missing, state.refused) == ("test_a", "1 fail on this card")


def test_the_tests_of_a_card_are_found_and_counted(tmp_path):
    found = {path.name for path in gpu_tests.marked(gpu_tests.CODE / "tests")}
    assert {"test_noise.py", "test_noise_on_a_card.py", "test_on_a_card.py"} <= found
    with pytest.raises(FileNotFoundError):
        gpu_tests.marked(tmp_path)
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
    )
    report = tmp_path / "report.xml"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(test)]
    subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True)
    assert gpu_tests.counts(report) == {"passed": 1, "failed": 1, "skipped": 1, "names": ["test_b"]}


def test_two_queues_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_queue, "ROOT", tmp_path)
    with (
        gpu_queue._alone(),
        pytest.raises(ConfigError, match="another gpu-queue is running"),
        gpu_queue._alone(),
    ):
        pass
    with open(tmp_path / ".snakemake" / "reproduce.lock", "w") as lock:
        with gpu_queue._alone():  # lets make reproduce run
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            pytest.raises(ConfigError, match="another make reproduce is running"),
            gpu_queue._alone(),
        ):
            pass
