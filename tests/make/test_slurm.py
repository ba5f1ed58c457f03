"""The nano chain on a real Slurm of one node: jobs cancelled and requeued, the same results.

Needs slurmctld, slurmd and munge (Debian's packages), root, and a machine without a Slurm of its
own. Everything listens on the loopback address and lives in a folder that goes away, but for
/etc/slurm/slurm.conf: the executor's job steps find no other place.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
from chains import copy_of_the_repository, files_of, mine, neft

MARK = {"NEFT_TEST_SLURM": str(os.getpid())}  # in the environment of all that a run here starts
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
SETTLED = Path("/etc/slurm/slurm.conf")
# Without accounting the executor must ask squeue, and need not wait for a database.
OPTIONS = "--slurm-status-command squeue --slurm-init-seconds-before-status-checks 5"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS),
        reason="needs root, slurmctld, slurmd, slurm-client and munge",
    ),
    pytest.mark.skipif(SETTLED.exists(), reason="this machine has a Slurm of its own"),
]
# A requeued job waits as long as credentials live (120 s by default); finished jobs stay listed
# (MinJobAge) until the test has read them. proctrack/linuxproc loses the Snakemake of a cancelled
# job, whose shell dies first; proctrack/cgroup is for clusters.
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    """A Slurm whose node is idle."""
    folder = Path(f"/run/neft-slurm-{os.getpid()}")  # munge trusts no folder below /tmp
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 1024
    host = socket.gethostname().split(".")[0]
    values = {"host": host, "folder": folder, "cores": os.cpu_count(), "memory": memory}
    SETTLED.parent.mkdir(exist_ok=True)
    SETTLED.write_text(CONFIG.format(ports=free_ports(2), **values))
    munge = ["munged", "--foreground", "--force", "--num-threads=2"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munge += [f"--socket={folder}/munge.socket"]
    daemons = []

    def start(*arguments):
        with open(folder / f"{arguments[0]}.out", "w") as log:
            daemons.append(subprocess.Popen(arguments, stdout=log, stderr=log))
        time.sleep(1)

    try:
        start(*munge)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        deadline, state = time.monotonic() + 60, ""
        while state != "idle" and time.monotonic() < deadline:
            time.sleep(0.5)
            done = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
            state = done.stdout.strip()
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert state == "idle", f"{state} {done.stderr}\n{logs}"
        yield
    finally:
        end_all_jobs()
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)
        SETTLED.unlink()


def asked(*arguments):
    """Lines of squeue; none where it does not answer."""
    done = subprocess.run(["squeue", "-h", *arguments], capture_output=True, text=True)
    return done.stdout.splitlines()


def end_all_jobs():
    """A slurmd that ends leaves its jobs running, and an interrupted test its Snakemake."""
    deadline, left = time.monotonic() + 30, True
    while left and time.monotonic() < deadline:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        left = asked()
        for process in psutil.process_iter(["environ"]):
            if MARK.items() <= (process.info["environ"] or {}).items():
                left.append(process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.5)


def on_slurm(folder, profile="nano"):
    """`make reproduce PROFILE=... ENGINE=slurm` in that copy; returns the process."""
    arguments = ["reproduce", "--profile", profile, "--engine", "slurm"]
    arguments.append(f"--engine-options={OPTIONS}")
    return neft(folder, *arguments, timeout=600, **MARK)


def trains(partial):
    """Whether the cell that trains runs in that copy of notebook 03, which papermill writes."""
    try:
        cells = json.loads(partial.read_text("utf-8"))["cells"]
    except (OSError, ValueError):  # gone by now, or half written
        return False
    for cell in cells:
        if "".join(cell["source"]).startswith("with recorded("):
            return cell["metadata"]["papermill"]["status"] == "running"
    return False


def disturb(act, run, notebooks, stop):
    """Do that to the job of a run as soon as it trains; returns the job's id, or None."""
    while not any(map(trains, notebooks.glob(f".03_finetune_qlora__{run}.*.ipynb"))):
        if stop.wait(0.2):
            return None
    name = f"rule_finetune_wildcards_{run.replace('-s', '_')}"
    (job,) = (
        line.split()[0] for line in asked("-t", "R", "-o", "%i %k") if line.split()[1] == name
    )
    subprocess.run([*act, job], check=True, capture_output=True)
    return job


def test_a_cancelled_and_a_requeued_job_cost_themselves_alone(cluster, tmp_path):
    here, there = (copy_of_the_repository(tmp_path / name) for name in ("here", "there"))
    profile = mine(tmp_path, seeds=[0])
    local = neft(here, "reproduce", "--profile", profile)
    assert local.returncode == 0, local.stdout + local.stderr
    places = [folder / "results" / "local" / "mine" for folder in (here, there)]
    acts = {"baseline-s0": ["scancel"], "neft_a15-s0": ["scontrol", "requeue"]}
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        hits = [
            pool.submit(disturb, act, run, places[1] / "notebooks", stop)
            for run, act in acts.items()
        ]
        try:
            done = on_slurm(there, profile)
        finally:
            stop.set()
    cancelled, requeued = (hit.result() for hit in hits)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cancelled and requeued
    fields = "JobID:20,State:20,RestartCnt:20,Comment:90"
    jobs = pd.DataFrame(
        [line.split() for line in asked("-t", "all", "-O", fields)],
        columns=["job", "state", "restarts", "step"],
    ).set_index("job")
    assert jobs.state[cancelled] == "CANCELLED"
    assert set(jobs.state.drop(cancelled)) == {"COMPLETED"}
    assert jobs.restarts[requeued] == "1" and set(jobs.restarts.drop(requeued)) == {"0"}
    again = jobs.step[jobs.step.duplicated(keep=False)]  # submitted more than once
    assert cancelled in again.index and len(again) == 2
    runs = [place / "runs" for place in places]
    assert files_of(runs[0]) == files_of(runs[1])
    items = [path.relative_to(runs[0]) for path in runs[0].glob("*/*.csv")]
    for path in items:
        if path.name != "train_log.csv":  # which tells the time
            assert (runs[0] / path).read_bytes() == (runs[1] / path).read_bytes(), path
    tables = [(place / "tables" / "by_seed.csv").read_text("utf-8") for place in places]
    timed = ["train_seconds", "answer_seconds"]
    tables = [pd.read_csv(io.StringIO(text)).drop(columns=timed) for text in tables]
    pd.testing.assert_frame_equal(*tables)
    again = on_slurm(there, profile)
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_a_step_that_fails_on_a_node_is_one_line_here(cluster, tmp_path):
    folder = copy_of_the_repository(tmp_path)
    notebook = folder / "notebooks" / "01_prepare_data.ipynb"
    text = notebook.read_text("utf-8")
    assert "encode(tokenizer, example)" in text
    broken = text.replace("encode(tokenizer, example)", "encode(tokenizer, exampel)")
    notebook.write_text(broken, "utf-8")
    done = on_slurm(folder)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "01_prepare_data: NameError: name 'exampel'" in lines[0]
