"""The nano chain on a real Slurm of one node: jobs cancelled and requeued, the same results.

Needs slurmctld, slurmd and munge (Debian's packages), root, and a machine without a Slurm of its
own. Everything listens on the loopback address and lives in a folder that goes away, but for
/etc/slurm/slurm.conf: the executor's job steps find no other place.
"""

import io
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from test_chain import copy_of_the_repository, files_of, neft

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
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MinJobAge=300
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
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)
        SETTLED.unlink()


def running():
    """Ids of the jobs that run now."""
    asked = ["squeue", "-h", "-t", "R", "-o", "%i"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split()


def on_slurm(folder):
    """`make reproduce PROFILE=nano ENGINE=slurm` in that copy; returns the process."""
    arguments = ["reproduce", "--profile", "nano", "--engine", "slurm"]
    arguments.append(f"--engine-options={OPTIONS}")
    return neft(folder, *arguments, timeout=900)


def test_a_cancelled_and_a_requeued_job_cost_themselves_alone(cluster, tmp_path):
    here, there = (copy_of_the_repository(tmp_path / name) for name in ("here", "there"))
    local = neft(here, "reproduce", "--profile", "nano")
    assert local.returncode == 0, local.stdout + local.stderr
    disturbed = []

    def disturb():
        """Cancel a job that trains, then requeue another."""
        runs = there / "results" / "local" / "nano" / "notebooks"
        for act in (["scancel"], ["scontrol", "requeue"]):
            while not list(runs.glob(".03_*")) or not (jobs := running()):
                if disturbed and disturbed[-1] == "over":
                    return
                time.sleep(0.2)
            time.sleep(2)
            jobs = running() or jobs
            done = subprocess.run([*act, jobs[0]], capture_output=True, text=True)
            disturbed.append((act[-1], jobs[0], done.returncode))
            time.sleep(8)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    done = on_slurm(there)
    acts = list(disturbed)
    disturbed.append("over")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [act for act, _, code in acts if code == 0] == ["scancel", "requeue"]
    places = [folder / "results" / "local" / "nano" for folder in (here, there)]
    assert files_of(places[0] / "runs") == files_of(places[1] / "runs")
    tables = [(place / "tables" / "by_seed.csv").read_text("utf-8") for place in places]
    timed = ["train_seconds", "answer_seconds"]
    tables = [pd.read_csv(io.StringIO(text)).drop(columns=timed) for text in tables]
    pd.testing.assert_frame_equal(*tables)
    again = on_slurm(there)
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
