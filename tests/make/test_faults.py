"""Killed anywhere, the next call finishes the job and ends with the same files, bit for bit.

The chain is nano with one seed. A kill is SIGKILL to every process of the command. Points inside a
write are met exactly: a hook in the processes under test stops at a rename until it is killed.
"""

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from chains import command, copy_of_the_repository, files_of, mine, neft, surroundings

# In the repository copy's root, which is on the path of every process: it waits, when a file of
# this name is about to take its place, until somebody kills it, once.
HOOK = """
import os, time
_replace = os.replace
def replace(source, target, *args, **kwargs):
    wanted, flag = os.environ.get("FAULT_AT"), os.environ.get("FAULT_FLAG")
    if wanted and wanted in os.fspath(target) and not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(600)
    return _replace(source, target, *args, **kwargs)
os.replace = replace
"""
# What is about to be renamed; or a notebook that has begun, and seconds from then.
WRITES = [
    "processed/mine/train-s0.jsonl",
    "processed/mine/manifest.json",
    "baseline-s0/config.json",
    "neft_a15-s0/train_log.csv",
    "baseline-s0/provenance.json",
    "03_finetune_qlora__neft_a15-s0.ipynb",
    "baseline-s0/losses.csv",
    "neft_a15-s0/generations.jsonl",
    "base-s0/scores.json",
    "tables/main.csv",
    "mine/claims.json",
    "90_exercise_solutions.ipynb",
]
MOMENTS = [
    ("01_prepare_data", 1.0),
    ("02_noisy_embeddings", 2.0),
    ("03_finetune_qlora", 0.2),
    ("03_finetune_qlora", 4.0),
    ("04_evaluate", 2.0),
    ("04_evaluate", 5.0),
    ("05_compare_and_plot", 1.0),
    ("90_exercise_solutions", 3.0),
]
POINTS = {one: (one, None) for one in WRITES}
POINTS |= {f"{name} {delay}": (name, delay) for name, delay in MOMENTS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an uninterrupted run, by their paths below runs/."""
    tmp_path = tmp_path_factory.mktemp("whole")
    folder = copy_of_the_repository(tmp_path)
    done = neft(folder, "reproduce", "--profile", mine(tmp_path, seeds=[0]))
    assert done.returncode == 0, done.stdout + done.stderr
    return files_of(folder / "results/local/mine/runs")


def start(folder, profile, **environment):
    return subprocess.Popen(
        command("reproduce", "--profile", profile),
        cwd="/",
        env=surroundings(folder, **environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "the point was never met"
        time.sleep(0.05)


def kill_all(pid):
    """kill -9 of a process and all its descendants (kernels start sessions of their own)."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGKILL)


def finishes(folder, profile, whole):
    """The next call ends well, with the uninterrupted run's files and no leftovers."""
    done = neft(folder, "reproduce", "--profile", profile)
    assert done.returncode == 0, done.stdout + done.stderr
    results = folder / "results" / "local" / "mine"
    assert files_of(results / "runs") == whole
    assert not list(results.glob("notebooks/.*.ipynb"))


def killed(point, folder, profile):
    """Start the chain there and kill it at that point."""
    name, delay = POINTS[point]
    hook, flag = folder / "sitecustomize.py", folder / "reached"
    hook.write_text(HOOK)
    if delay is None:
        process = start(folder, profile, FAULT_AT=name, FAULT_FLAG=str(flag))
        wait_until(flag.exists, process)
    else:
        begun = folder / "results/local/mine/notebooks"
        earlier = set(begun.glob(".*"))  # of calls that were killed
        process = start(folder, profile)
        wait_until(lambda: set(begun.glob(f".{name}*")) - earlier, process)
        time.sleep(delay)
    kill_all(process.pid)
    process.wait()
    hook.unlink()
    flag.unlink(missing_ok=True)


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_killed_there_the_next_call_finishes_with_the_same_bits(point, whole, tmp_path):
    folder, profile = copy_of_the_repository(tmp_path), mine(tmp_path, seeds=[0])
    killed(point, folder, profile)
    finishes(folder, profile, whole)


@pytest.mark.faults  # seven minutes; test_gpu_queue.py kills a chain in every make test
def test_killed_again_and_again_it_still_ends_with_the_same_bits(whole, tmp_path):
    """At several points of one chain; each of the twenty by itself is in the test above."""
    folder, profile = copy_of_the_repository(tmp_path), mine(tmp_path, seeds=[0])
    for point in (
        "baseline-s0/provenance.json",
        "03_finetune_qlora 4.0",
        "neft_a15-s0/generations.jsonl",
    ):
        killed(point, folder, profile)
    finishes(folder, profile, whole)


@pytest.mark.faults
def test_interrupted_from_the_keyboard_it_says_how_to_go_on(whole, tmp_path):
    folder, profile = copy_of_the_repository(tmp_path), mine(tmp_path, seeds=[0])
    process = start(folder, profile)
    begun = folder / "results/local/mine/notebooks"
    wait_until(lambda: list(begun.glob(".03_*")), process)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command again to go on" in said
    finishes(folder, profile, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 3 MB; skips where none can be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.faults
def test_a_full_disk_is_one_line_and_nothing_half_written_counts(whole, small_disk, tmp_path):
    folder, profile = copy_of_the_repository(tmp_path / "r"), mine(tmp_path, seeds=[0])
    results = folder / "results" / "local"
    results.symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 2_500_000)
    done = neft(folder, "reproduce", "--profile", profile)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr
    assert "No space left" in errors[0]
    filler.unlink()
    results.unlink()  # the rest needs more than the small disk has; what is whole there is kept
    shutil.copytree(small_disk, results)
    finishes(folder, profile, whole)


@pytest.mark.faults
def test_a_results_folder_that_is_read_only_is_one_line(small_disk, tmp_path):
    folder = copy_of_the_repository(tmp_path / "r")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (folder / "results" / "local").symlink_to(small_disk)
    done = neft(folder, "reproduce", "--profile", mine(tmp_path, seeds=[0]))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "make it writable" in lines[0], lines


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [{"LC_ALL": "C"}, {"TZ": "Pacific/Auckland"}, {"PYTHONHASHSEED": "7"}],
    ids=lambda change: next(iter(change)),
)
def test_locale_time_zone_and_hash_seed_change_no_file(change, whole, tmp_path):
    folder, profile = copy_of_the_repository(tmp_path), mine(tmp_path, seeds=[0])
    done = neft(folder, "reproduce", "--profile", profile, "--cores", "1", **change)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(folder / "results/local/mine/runs") == whole
