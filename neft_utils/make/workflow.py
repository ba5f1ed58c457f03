"""How steps are run: papermill executes one notebook, Snakemake decides which.

Nothing here schedules: Snakemake knows what is done, and this module starts it and turns its
log into a line per finished step.
"""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from urllib.parse import quote

from neft_utils.base.estimate import estimate
from neft_utils.base.files import CODE, ROOT, atomic_write_text
from neft_utils.base.paths import NOTEBOOKS, STEPS
from neft_utils.base.plain import plain
from neft_utils.base.steps import CHAIN
from neft_utils.base.strict import ConfigError
from neft_utils.make import preflight
from neft_utils.make.progress import Progress, planned_seconds

# oneDNN keeps the code that it made for every shape of matrix it met, 1,024 by default; rows of
# a new length bring two dozen shapes of 0.6 MB, which fill gigabytes within a run.
ONEDNN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
# On some processors bitsandbytes says at import that it found no kernel hub: no reader needs one.
_ERRORS_ONLY = "__import__('logging').getLogger('bitsandbytes').setLevel('ERROR')"
# At its end a kernel is interrupted, and a slow one says so as if that were an error (level 40).
QUIET = {
    "extra_arguments": [f"--IPKernelApp.exec_lines={_ERRORS_ONLY}", "--IPKernelApp.log_level=50"]
}

TEXT = "text="  # begins what is a text, whatever it looks like


def one_line(error):
    """A message without line breaks; OSErrors named by what to do about them."""
    if isinstance(error, OSError) and error.errno is not None:
        hint = {28: "free some space", 13: "make it writable", 30: "make it writable"}
        remedy = hint.get(error.errno, "check the path")
        error = f"{error.strerror}: {error.filename or 'the results folder'} ({remedy})"
    return " ".join(plain(error).split())


def write_notebook(path, notebook):
    """Write a notebook given as JSON values, atomically, in nbformat's own layout."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    atomic_write_text(path, text + "\n")


def execute(profile, reference, paths, step, arm=None, seed=None):
    """Run one notebook in a fresh kernel; its executed copy appears only when it is whole."""
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # else a line per cell
    # Libraries' warnings that no reader can act on, each with this machine's path.
    os.environ["PYTHONWARNINGS"] = (
        "ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated"
    )
    # The kernel starts in notebooks/, and would import the package that .venv was made with.
    os.environ |= own_code(os.environ) | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # else a bar of every tensor that is loaded
    source, target = NOTEBOOKS / f"{STEPS[step]}.ipynb", paths.notebook(step, arm, seed)
    parameters = {"PROFILE": reference, "ARM": arm, "SEED": seed, "OUT": paths.out}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    known = papermill.inspect_notebook(str(source))
    if unknown := sorted(set(parameters) - set(known)):
        raise ConfigError(
            f"{source.name} has no parameter {', '.join(unknown)}: it has {', '.join(known)}"
        )
    if arm is not None:
        profile.check_run(arm, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.stem}.*.ipynb"):  # of a killed run
        if not _alive(stale.suffixes[-2].strip(".")):
            stale.unlink()
    partial = target.with_name(f".{target.stem}.{os.getpid()}.ipynb")
    label = target.stem
    try:
        # Sockets in a folder of its own: of kernels that start at once, two may find one free port.
        # A socket's path has 107 characters at most.
        place = "/tmp" if len(tempfile.gettempdir()) > 80 else None
        with tempfile.TemporaryDirectory(prefix="neft-", dir=place) as sockets:
            connection = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                str(source),
                str(partial),
                parameters,
                cwd=str(NOTEBOOKS),
                kernel_name="python3",
                config=Config({"KernelManager": connection, "NotebookClient": QUIET}),
                progress_bar=False,
                log_output=False,
            )
        text = json.loads(partial.read_text("utf-8"))
        # papermill notes this machine's paths: results shall not carry them.
        text["metadata"]["papermill"] = {
            key: text["metadata"]["papermill"][key]
            for key in ("duration", "end_time", "parameters")
        }
        write_notebook(target, text)
        target.with_name(f"{target.stem}.failed.ipynb").unlink(missing_ok=True)
    except papermill.PapermillExecutionError as error:
        failed = target.with_name(f"{target.stem}.failed.ipynb")
        partial.replace(failed)
        reason = one_line(ValueError(error.evalue))
        place = os.path.relpath(failed, ROOT)
        raise RuntimeError(
            f"{label}: {error.ename}: {reason} (cell {error.cell_index}, {place})"
        ) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RuntimeError(
            f"{label}: the kernel died ({one_line(error)}); if memory ran out, lower"
            " train.micro_batch_tokens in the profile or --cores, and run the same command again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _alive(pid):
    """Whether a process of that number runs here."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def own_code(environment):
    """What makes a Python import this package, and no copy that its .venv was made for."""
    more = environment.get("PYTHONPATH")
    return {"PYTHONPATH": f"{CODE}{os.pathsep}{more}" if more else str(CODE)}


def check_engine(engine):
    """Raise ConfigError unless Snakemake can hand jobs to this engine from here."""
    if engine == "local":
        return
    if importlib.util.find_spec(f"snakemake_executor_plugin_{engine.replace('-', '_')}") is None:
        raise ConfigError(
            f"ENGINE={engine}: no such executor is installed: use local or slurm, or install"
            f" snakemake-executor-plugin-{engine}"
        )
    if engine == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "ENGINE=slurm: there is no sbatch here: run it where jobs are submitted, or without"
            " ENGINE"
        )


def _engine_arguments(engine, count, logs, options):
    if engine == "local":
        return ["--cores", str(count), *options]
    arguments = ["--executor", engine, "--jobs", str(count), "--retries", "1"]
    if engine == "slurm":  # a node that fails costs its jobs, and Slurm starts them again
        arguments += ["--slurm-requeue", "--slurm-logdir", str(logs)]
    return arguments + list(options)


def settings(reference, out):
    """Snakemake's arguments for a profile and a folder, of whatever name.

    Snakemake takes values for numbers or YAML where it can (007 for 7), and an executor puts them
    into a shell's command as they are.
    """
    return [f"profile={TEXT}{quote(reference)}", f"out={TEXT}{quote(out)}"]


def run_all(profile, reference, paths, count, lock, engine="local", options=()):
    """Run every step that is not done, `count` at a time; returns Snakemake's exit code.

    lock: file descriptor that Snakemake keeps open, so that the lock outlives a killed parent.
    engine: "local", or the name of a Snakemake executor such as "slurm", whose jobs see the same
    files; options: more arguments of Snakemake's, for that executor.
    """
    environment = dict(os.environ, PYTHONHASHSEED="0", TOKENIZERS_PARALLELISM="false")
    # Steps call "python": the one that runs this, whether or not its environment is activated.
    own = os.path.dirname(sys.executable)
    environment["PATH"] = f"{own}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment |= own_code(environment) | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    if profile.device == "cpu":  # two threads of one run fight as soon as anything else runs
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= ONEDNN
    elif engine == "local":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, preflight.cores() // count)))
    # Cores of a cluster's node beside a GPU, for the loading of data.
    threads = 4 if profile.device == "cuda" and engine != "local" else 1
    logs = ROOT / ".snakemake" / "slurm_logs"  # no name of a user's: sbatch is called by a shell
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(NOTEBOOKS.parent / "Snakefile"),
        "--directory",
        str(ROOT),
        *_engine_arguments(engine, count, logs, options),
        "--nolock",
        "--rerun-incomplete",
        "--keep-going",  # a step that fails costs those that need it, and no others
        "--rerun-triggers",
        "mtime",
        "params",
        "input",
        "--config",
        *settings(reference, paths.out),
        f"threads={threads}",
        f"whole={count if engine == 'local' else threads}",  # of a step that runs alone
    ]
    log = paths.results / "snakemake.log"
    began = time.time()
    planned = planned_seconds(estimate(profile, paths), CHAIN)
    progress = Progress(planned, count, time.monotonic())
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        stderr=subprocess.STDOUT,
        pass_fds=(lock,),
    )
    stop = threading.Event()
    threading.Thread(target=_heartbeat, args=(progress, stop), daemon=True).start()
    try:
        with open(log, "w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if said := progress.read(line.rstrip(), time.monotonic()):
                    failed = said.startswith("error:")
                    print(said, file=sys.stderr if failed else sys.stdout, flush=True)
        code = process.wait()
    except BaseException:
        process.terminate()  # Snakemake stops its jobs and keeps what is finished
        process.wait()
        raise
    finally:
        stop.set()
    if code:
        _say_what_failed(progress, log, logs, began)
    elif progress.nothing:
        print("nothing to do: every step is done and nothing it depends on has changed")
    return code


def _say_what_failed(progress, log, logs, began):
    """At the end, where they are seen: the steps that failed, each with its executed copy."""
    errors = progress.errors
    if not errors:  # on another machine, they went to the jobs' own logs
        errors = _errors_of_jobs(logs, began)
        for line in errors:
            print(line, file=sys.stderr)
    if not errors:  # Snakemake's own: a missing file, a killed job
        tail = [x for x in log.read_text("utf-8").splitlines() if x.strip()][-3:]
        print(f"error: {' '.join(tail)}", file=sys.stderr)
    if len(errors) > 1:
        names = [line.removeprefix("error: ").partition(":")[0] for line in errors]
        print(f"{len(errors)} steps failed: {', '.join(names)}", file=sys.stderr)
    done = f"{progress.done} of {progress.steps} steps are done; " if progress.steps else ""
    print(
        f"stopped: {done}the same command goes on from there; the whole log is"
        f" {os.path.relpath(log, ROOT)}",
        file=sys.stderr,
    )


def _errors_of_jobs(logs, since):
    """The one lines of steps that failed, from the logs of jobs on other machines."""
    recent = [path for path in logs.rglob("*.log") if path.stat().st_mtime >= since]
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(recent)]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("error:")]
    return list(dict.fromkeys(lines))


def _heartbeat(progress, stop):
    while not stop.wait(60):
        print(progress.status(time.monotonic()), flush=True)
